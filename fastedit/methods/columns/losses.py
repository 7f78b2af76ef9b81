"""Losses of edits whose columns are trained, with the gradient of their sum in the rows that the head reads.

For an edit with a prompt of P tokens and a target y_1 .. y_S, whose rows are its P + S tokens:
    edit        max_j -log p(y_j), or the mean over j
    drift       kl_factor * mean over the prompt's positions but the last of KL(p_0 || p), p_0 that of the first call
    repetition  repetition_factor * max_j -log(1 - p(y_j)) at the target's last token, where the target has been said
The gradients are closed forms: p - p_0 for a drift row, p - onehot for the worst token, q / (1 - q) (onehot - p) for
the repetition. Only the rows that have a gradient are multiplied back.
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
    """losses: (n_edits,) edit, drift and repetition; worst: (n_edits,) max_j -log p(y_j); grad: (n_rows, d_head)."""

    losses: Tensor
    worst: Tensor
    grad: Tensor


class ColumnLoss:
    """The losses of edits whose rows stand one behind the other, (n_rows, d_head).

    sequences: whole sequences, every token of the target among the inputs (`tokens.whole_sequences`)
    """

    def __init__(self, sequences: Sequence[TokenSequence], config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.sequences = list(sequences)
        self._reference: tuple[Tensor, Tensor] | None = None
        starts = [0, *accumulate(len(s.ids) for s in sequences)]
        self.n_rows = starts.pop()
        prompts = [s.scored[0] if config.kl_factor else 0 for s in sequences]
        drift = [start + p for start, length in zip(starts, prompts, strict=True) for p in range(length)]
        after = [start + len(s.ids) - 1 for start, s in zip(starts, sequences, strict=True)]
        scored = [start + p for start, s in zip(starts, sequences, strict=True) for p in s.scored]
        self.n_drift, self.n_after = len(drift), len(after) if config.repetition_factor else 0
        # Rows in the order of the head's product: drift, after the target, scored.
        self.rows = self._tensor([*drift, *after[: self.n_after], *scored])
        self.drift_owner = self._tensor([edit for edit, length in enumerate(prompts) for _ in range(length)])
        drift_factor = [config.kl_factor / max(1, n) for n in prompts]
        self.drift_factor = torch.tensor(drift_factor, dtype=torch.float64, device=device)
        self.targets = self._tensor([token for s in sequences for token in s.targets])
        counts = torch.tensor([len(s.targets) for s in sequences])
        width = int(counts.max()) if len(counts) else 0
        step = torch.arange(width)
        self.real = (step[None] < counts[:, None]).to(device)
        first = counts.cumsum(0) - counts
        # (n_edits, width): which scored row holds an edit's j-th target token; padded by repeating the last.
        self.grid = (first[:, None] + torch.minimum(step[None], counts[:, None] - 1)).to(device)
        self.counts = counts.to(device)

    def keep(self, mask: Tensor) -> ColumnLoss:
        """The losses of the edits where mask (n_edits,) is True."""
        flags = mask.tolist()
        kept = ColumnLoss([s for s, keep in zip(self.sequences, flags, strict=True) if keep], self.config, self.device)
        if self._reference is not None:
            rows = mask.to(self.device)[self.drift_owner]
            kept._reference = self._reference[0][rows], self._reference[1][rows]
        return kept

    def __call__(self, rows: Tensor, head: Head, buffer: LogitBuffer) -> ColumnLosses:
        """Losses of the rows (n_rows, d_head). The first call sets what drift is measured from."""
        n_plain = self.n_drift + self.n_after
        logits = buffer.logits(rows.index_select(0, self.rows), head)
        log_sum = logits.logsumexp(1)
        drift = self._drift(logits[: self.n_drift], log_sum[: self.n_drift])
        repetition, repeated, push = self._repetition(logits[self.n_drift : n_plain], log_sum[self.n_drift : n_plain])
        scored = logits[n_plain:]
        loss = log_sum[n_plain:] - scored.gather(1, self.targets[:, None])[:, 0]
        worst, place = loss[self.grid].masked_fill(~self.real, -torch.inf).max(1)
        if self.config.reduce == "worst":
            edit, chosen = worst, self.grid.gather(1, place[:, None])[:, 0]
            weight = torch.ones_like(worst)
        else:
            edit = loss[self.grid].masked_fill(~self.real, 0).sum(1) / self.counts
            chosen = torch.arange(len(self.targets), device=self.device)
            weight = (1 / self.counts.to(loss.dtype)).repeat_interleave(self.counts, output_size=len(self.targets))
        grad = rows.new_zeros(len(self.rows), rows.shape[1], dtype=logits.dtype)
        picked = _pull(scored[chosen], log_sum[n_plain:][chosen], self.targets[chosen], head)
        grad[n_plain + chosen] = picked * weight[:, None]
        grad[self.n_drift : n_plain] = (
            _pull(logits[self.n_drift : n_plain], log_sum[self.n_drift : n_plain], repeated, head) * push[:, None]
        )
        if self.n_drift:
            factor = self.drift_factor.to(logits.dtype)[self.drift_owner]
            away = _pull(logits[: self.n_drift], log_sum[: self.n_drift], self._before()[0], head)
            grad[: self.n_drift] = away * factor[:, None]
        spread = grad.new_zeros(rows.shape).index_copy_(0, self.rows, grad)
        return ColumnLosses(edit + drift + repetition, worst, spread)

    def _before(self) -> tuple[Tensor, Tensor]:
        assert self._reference is not None
        return self._reference

    def _drift(self, logits: Tensor, log_sum: Tensor) -> Tensor:
        """(n_edits,) weighted mean of KL(p_0 || p) = <p_0, log p_0> - <p_0, z> + log sum exp z."""
        total = log_sum.new_zeros(len(self.sequences))
        if not self.n_drift:
            return total
        if self._reference is None:
            before = torch.exp(logits - log_sum[:, None])
            # Taken as it is below, so that an unchanged model has drifted by nothing, to the bit.
            self._reference = before, torch.linalg.vecdot(before, logits) - log_sum
        before, inner = self._before()
        divergence = inner - torch.linalg.vecdot(before, logits) + log_sum
        return total.index_add_(0, self.drift_owner, divergence) * self.drift_factor.to(total.dtype)

    def _repetition(self, logits: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n_edits,) losses, the tokens y that cause them, and the factor of p - onehot(y) in their gradient."""
        if not self.n_after:
            return log_sum.new_zeros(len(self.sequences)), self.targets[:0], log_sum[:0]
        tokens = self.targets[self.grid]
        odds = torch.exp(logits.gather(1, tokens) - log_sum[:, None]).masked_fill(~self.real, -1)
        most, place = odds.max(1)
        rest = (1 - most).clamp_min(LEAST)
        factor = self.config.repetition_factor
        return -factor * rest.log(), tokens.gather(1, place[:, None])[:, 0], -factor * most / rest

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _pull(logits: Tensor, log_sum: Tensor, wanted: Tensor, head: Head) -> Tensor:
    """(p - wanted) through the head, (n, d_head); overwrites logits (n, n_vocabulary).

    wanted: (n,) int64 tokens for onehot, or (n, n_vocabulary) probabilities"""
    slope = None if head.softcap is None else 1 - (logits / head.softcap).square()
    error = logits.sub_(log_sum[:, None]).exp_()
    if wanted.dim() == 2:
        error.sub_(wanted)
    else:
        error[torch.arange(len(wanted), device=error.device), wanted] -= 1
    if slope is not None:
        error.mul_(slope)
    return torch.mm(error.to(head.weight.dtype), head.weight).to(log_sum.dtype)
