"""Losses of edits whose columns are trained, with the gradient of their sum in the rows that the head reads.

For an edit with a prompt of P tokens and a target y_1 .. y_S, whose rows are its P + S tokens (FiNE, arXiv 2503.01090):
    edit        max_j -log p(y_j), or the mean over j
    drift       kl_factor * mean over the prompt's positions but the last of KL(p_0 || p), p_0 from the first call
    repetition  repetition_factor * max_j -log(1 - p(y_j)) at the target's last token, after the whole target
The gradients in the logits have closed forms: p - p_0 for a drift row, p - onehot for the worst token, and
q / (1 - q) (onehot - p) for the repetition, q the probability of its token. Only rows with a gradient go back through
the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.methods.columns.config import TrainConfig
from fastedit.model.logits import Head, LogitBuffer
from fastedit.model.tokens import TokenSequence

# The smallest 1 - q: keeps the repetition loss finite and its gradient bounded.
LEAST = 1e-6


class ColumnLosses(NamedTuple):
    """Losses of n edits.

    losses: (n_edits,) edit + drift + repetition
    worst: (n_edits,) max_j -log p(y_j)
    grad: (n_rows, d_head), gradient of the losses' sum
    All in the dtype of the logits.
    """

    losses: Tensor
    worst: Tensor
    grad: Tensor


class TokenLosses(NamedTuple):
    """The edit loss and the target tokens that have a gradient.

    edit, worst: (n_edits,)
    chosen: (n_chosen,) int64, places among all target tokens; weights: (n_chosen,) their factors in `edit`
    """

    edit: Tensor
    worst: Tensor
    chosen: Tensor
    weights: Tensor


class Reference(NamedTuple):
    """What drift is measured from, row by row: p_0 (n_drift, n_vocabulary) and sum p_0 log p_0 (n_drift,)."""

    probabilities: Tensor
    inner: Tensor


class Repetition(NamedTuple):
    """losses: (n_edits,); tokens: (n_edits,) int64, the tokens y that cause them; factors: (n_edits,) of p - onehot(y)
    in the gradient. Tokens and factors are empty where the loss is switched off."""

    losses: Tensor
    tokens: Tensor
    factors: Tensor


class ColumnLoss:
    """The losses of edits whose rows stand one edit after the other, (n_rows, d_head).

    sequences: whole sequences, with every target token among the inputs (`tokens.whole_sequences`)
    device: of the head
    """

    def __init__(self, sequences: Sequence[TokenSequence], config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.sequences = list(sequences)
        self._reference: Reference | None = None
        self._index_rows()
        self._index_targets()

    def _index_rows(self) -> None:
        """Which rows the head multiplies: those of drift, then those after a target, then the scored ones."""
        sequences = self.sequences
        starts = [0, *accumulate(len(s.ids) for s in sequences)]
        self.n_rows = starts.pop()

        n_drift = [s.scored[0] if self.config.kl_factor else 0 for s in sequences]
        drift = [start + p for start, count in zip(starts, n_drift, strict=True) for p in range(count)]
        after = [start + len(s.ids) - 1 for start, s in zip(starts, sequences, strict=True)]
        if not self.config.repetition_factor:
            after = []
        scored = [start + p for start, s in zip(starts, sequences, strict=True) for p in s.scored]

        self.n_drift = len(drift)
        self.n_after = len(after)
        self.rows = self._tensor([*drift, *after, *scored])
        self.drift_owner = self._tensor([edit for edit, count in enumerate(n_drift) for _ in range(count)])
        factors = [self.config.kl_factor / max(1, count) for count in n_drift]
        self.drift_factor = torch.tensor(factors, dtype=torch.float64, device=self.device)

    def _index_targets(self) -> None:
        """The targets of all edits as one list, and the grid that holds them edit by edit."""
        self.targets = self._tensor([token for s in self.sequences for token in s.targets])
        counts = torch.tensor([len(s.targets) for s in self.sequences])
        first = counts.cumsum(0) - counts
        step = torch.arange(int(counts.max()) if len(counts) else 0)

        # (n_edits, longest target): place of an edit's j-th target token in `targets`, padded by repeating the last.
        self.grid = (first[:, None] + torch.minimum(step[None], counts[:, None] - 1)).to(self.device)
        # False where the grid is padded.
        self.real = (step[None] < counts[:, None]).to(self.device)
        self.counts = counts.to(self.device)

    def keep(self, mask: Tensor) -> ColumnLoss:
        """The losses of the edits where mask (n_edits,) bool, on the CPU, is True."""
        remaining = [s for s, keep in zip(self.sequences, mask.tolist(), strict=True) if keep]
        smaller = ColumnLoss(remaining, self.config, self.device)
        if self._reference is not None:
            rows = mask.to(self.device)[self.drift_owner]
            smaller._reference = Reference(self._reference.probabilities[rows], self._reference.inner[rows])
        return smaller

    def __call__(self, rows: Tensor, head: Head, buffer: LogitBuffer) -> ColumnLosses:
        """Losses of the rows (n_rows, d_head). The first call sets what drift is measured from."""
        logits = buffer.logits(rows.index_select(0, self.rows), head)
        log_sum = logits.logsumexp(1)
        drift_rows = slice(0, self.n_drift)
        after_rows = slice(self.n_drift, self.n_drift + self.n_after)
        scored_rows = slice(self.n_drift + self.n_after, None)

        drift = self._drift(logits[drift_rows], log_sum[drift_rows])
        repetition = self._repetition(logits[after_rows], log_sum[after_rows])
        scored, scored_log_sum = logits[scored_rows], log_sum[scored_rows]
        token = self._tokens(scored_log_sum - scored.gather(1, self.targets[:, None])[:, 0])

        # `_head_grad` overwrites the logits it is given, so every loss is computed before.
        grad = rows.new_zeros(len(self.rows), rows.shape[1], dtype=logits.dtype)
        chosen = token.chosen
        chosen_grad = _head_grad(scored[chosen], scored_log_sum[chosen], self.targets[chosen], head)
        grad[scored_rows.start + chosen] = chosen_grad * token.weights[:, None]
        after_grad = _head_grad(logits[after_rows], log_sum[after_rows], repetition.tokens, head)
        grad[after_rows] = after_grad * repetition.factors[:, None]
        if self._reference is not None:
            factors = self.drift_factor.to(logits.dtype)[self.drift_owner]
            drift_grad = _head_grad(logits[drift_rows], log_sum[drift_rows], self._reference.probabilities, head)
            grad[drift_rows] = drift_grad * factors[:, None]

        spread = grad.new_zeros(rows.shape).index_copy_(0, self.rows, grad)
        return ColumnLosses(token.edit + drift + repetition.losses, token.worst, spread)

    def _tokens(self, losses: Tensor) -> TokenLosses:
        """The edit loss. losses: (n_targets,) -log p of every target token"""
        by_edit = losses[self.grid]
        worst, place = by_edit.masked_fill(~self.real, -torch.inf).max(1)
        if self.config.reduce == "worst":
            chosen = self.grid.gather(1, place[:, None])[:, 0]
            return TokenLosses(worst, worst, chosen, torch.ones_like(worst))

        edit = by_edit.masked_fill(~self.real, 0).sum(1) / self.counts
        chosen = torch.arange(len(self.targets), device=self.device)
        weights = (1 / self.counts.to(losses.dtype)).repeat_interleave(self.counts, output_size=len(self.targets))
        return TokenLosses(edit, worst, chosen, weights)

    def _drift(self, logits: Tensor, log_sum: Tensor) -> Tensor:
        """(n_edits,) weighted mean of KL(p_0 || p) = <p_0, log p_0> - <p_0, z> + log sum exp z, z the logits."""
        total = log_sum.new_zeros(len(self.sequences))
        if not self.n_drift:
            return total

        if self._reference is None:
            before = torch.exp(logits - log_sum[:, None])
            # The same products as below, so that the drift of an unchanged model is exactly 0.
            self._reference = Reference(before, torch.linalg.vecdot(before, logits) - log_sum)
        before, inner = self._reference
        divergence = inner - torch.linalg.vecdot(before, logits) + log_sum
        return total.index_add_(0, self.drift_owner, divergence) * self.drift_factor.to(total.dtype)

    def _repetition(self, logits: Tensor, log_sum: Tensor) -> Repetition:
        """The repetition loss from the logits at each target's last token, (n_edits, n_vocabulary)."""
        if not self.n_after:
            return Repetition(log_sum.new_zeros(len(self.sequences)), self.targets[:0], log_sum[:0])

        tokens = self.targets[self.grid]
        probabilities = torch.exp(logits.gather(1, tokens) - log_sum[:, None]).masked_fill(~self.real, -1)
        most, place = probabilities.max(1)
        rest = (1 - most).clamp_min(LEAST)
        factor = self.config.repetition_factor
        return Repetition(-factor * rest.log(), tokens.gather(1, place[:, None])[:, 0], -factor * most / rest)

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def _head_grad(logits: Tensor, log_sum: Tensor, wanted: Tensor, head: Head) -> Tensor:
    """(p - wanted) back through the head, (n, d_head). Overwrites logits (n, n_vocabulary).

    wanted: (n,) int64, tokens that stand for their onehot, or (n, n_vocabulary) probabilities"""
    slope = None if head.softcap is None else 1 - (logits / head.softcap).square()
    error = logits.sub_(log_sum[:, None]).exp_()
    if wanted.dim() == 2:
        error.sub_(wanted)
    else:
        error[torch.arange(len(wanted), device=error.device), wanted] -= 1
    if slope is not None:
        error.mul_(slope)
    return torch.mm(error.to(head.weight.dtype), head.weight).to(log_sum.dtype)
