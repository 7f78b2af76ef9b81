"""Value optimisation for many edits at once.

For every edit a vector delta is added to the output of the value layer at the lookup token (of its down-projection,
where a norm stands behind that), and Adam lowers
    mean_q [ -(1/T) sum_t log p(y_t | r_q, y_<t) ]  +  kl_factor * KL(p_now || p_start)  +  decay * ||delta|| / ||h0||^2
over six contexts r_q, the KL at the subject's last token of "{subject} is a". The value is z = h0 + delta.
This is the procedure of MEMIT (Meng et al. 2023), shared by AlphaEdit, NSE and NMKE. Edits never meet: losses are
summed, so that each row's gradient is what it would be alone, and Adam, clamp and stop rule are per row.

Three exact savings: only live rows are run again (`model.packed_passes`), logits are computed at scored positions
alone, and the last step's forward is not run: it could change nothing but a printed loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastedit.methods.closed_form.config import ValueConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.model.logits import LogitBuffer, log_probabilities, loss_rows
from fastedit.model.packed_passes import live_rows
from fastedit.model.tokens import TokenSequence, rewrite_sequences, subject_sequences
from fastedit.ops.sparse_adam import AdamSettings, sparse_adam
from fastedit.records.edit import Edit


@dataclass(frozen=True)
class Values:
    """Optimised values of n edits.

    z: (n, d_model) float32, the target hidden state after the value layer, or the target output of its
        down-projection where the model is post-norm
    hidden: (n, d_model) float32, the start h0
    losses: (n,) float32, loss at the last forward
    steps: (n,) int64, Adam steps taken
    """

    z: Tensor
    hidden: Tensor
    losses: Tensor
    steps: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under the names that run directories store; z is stored as "values"."""
        return {"values": self.z, "hidden": self.hidden, "losses": self.losses, "steps": self.steps}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Values:
        """The inverse of `tensors`. Raises KeyError for a missing name."""
        return cls(tensors["values"], tensors["hidden"], tensors["losses"], tensors["steps"])


def optimise_values(
    model: ModelAdapter,
    edits: Sequence[Edit],
    templates: Sequence[str],
    layer: int,
    config: ValueConfig,
    progress: Callable[[int], None] | None = None,
    upper: ModelAdapter | None = None,
) -> Values:
    """Optimise the values of all edits at `layer`, on the model's present weights.

    templates: context templates with one `{}` each, the first of them "{}" itself
    progress: called with the number of edits finished since the last call
    upper: what runs the layers above `layer` (`upper_layers`); default: made here
    Edits are sorted by length and run in groups of at most `config.token_budget` live rows.
    """
    upper = upper or upper_layers(model, layer, config)
    rewrites = rewrite_sequences(model.tokenizer, edits, templates)
    subjects = subject_sequences(model.tokenizer, edits)
    sequences = [[*rows, subject] for rows, subject in zip(rewrites, subjects, strict=True)]
    shape = (len(edits), model.d_model)
    found = Values(
        torch.zeros(shape),
        torch.zeros(shape),
        torch.zeros(len(edits)),
        torch.zeros(len(edits), dtype=torch.int64),
    )
    with model.packed():
        for group in group_by_length(sequences, config.token_budget):
            state = _Group(model, [sequences[i] for i in group], layer, config, upper)
            part = _optimise_group(state, config, progress)
            index = torch.tensor(group)
            found.z[index] = part.z.cpu()
            found.hidden[index] = part.hidden.cpu()
            found.losses[index] = part.losses.cpu()
            found.steps[index] = part.steps.cpu()
    return found


def upper_layers(model: ModelAdapter, layer: int, config: ValueConfig) -> ModelAdapter:
    """What runs the layers above the value layer: the model itself, or a copy of them in config.dtype.

    No edit changes them, so one copy serves a whole stream."""
    emulated = model.dtype == torch.float16 and model.device.type == "cpu"
    wanted = ("float32" if emulated else "model") if config.dtype == "auto" else config.dtype
    return model if wanted == "model" else model.upper_copy(layer + 1, getattr(torch, wanted))


def group_by_length(sequences: Sequence[Sequence[TokenSequence]], token_budget: int) -> list[list[int]]:
    """Indices of edits in groups of similar length, each of at most token_budget live rows (or one edit)."""
    longest = [max(len(s.ids) - s.lookup for s in rows) for rows in sequences]
    total = [sum(len(s.ids) - s.lookup for s in rows) for rows in sequences]
    groups: list[list[int]] = []
    used = 0
    for i in sorted(range(len(sequences)), key=lambda i: (longest[i], total[i], i)):
        if not groups or used + total[i] > token_budget:
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += total[i]
    return groups


@dataclass
class _State:
    """What each edit of a group carries through the steps: (n, d_model) float32 vectors and (n,) numbers."""

    index: Tensor
    delta: Tensor
    moment1: Tensor
    moment2: Tensor
    decay: Tensor
    radius: Tensor
    top1_steps: Tensor

    def keep(self, mask: Tensor) -> _State:
        """The edits where mask (n,) is True."""
        return _State(*(getattr(self, column.name)[mask] for column in fields(self)))


class _Group:
    """Edits optimised together: the constant rows, and the loss with its gradient in delta."""

    def __init__(
        self,
        model: ModelAdapter,
        sequences: Sequence[Sequence[TokenSequence]],
        layer: int,
        config: ValueConfig,
        upper: ModelAdapter,
    ) -> None:
        self.model, self.config = upper, config
        self.n_templates = len(sequences[0]) - 1
        self.rewrites = [sequence for rows in sequences for sequence in rows[:-1]]
        with torch.no_grad():
            every = [*self.rewrites, *(rows[-1] for rows in sequences)]
            self.live, hidden = live_rows(model, every, layer, upper)
        self.hidden = hidden[: len(self.rewrites) : self.n_templates].float()
        self.reference: Tensor | None = None
        self.buffer = LogitBuffer()
        self._index_rows(len(sequences))

    def _index_rows(self, n_edits: int) -> None:
        device = self.model.device
        scoring = self.model.head.weight.device
        edits = torch.arange(n_edits)
        self.owner = torch.cat([edits.repeat_interleave(self.n_templates), edits]).to(device)
        counts = torch.tensor(self.live.scored_counts).to(device)
        self.row_owner = self.owner.repeat_interleave(counts, output_size=sum(self.live.scored_counts))
        self.targets = torch.tensor([token for s in self.rewrites for token in s.targets], device=scoring)
        weights = [1 / (self.n_templates * len(s.targets)) for s in self.rewrites for _ in s.targets]
        self.weights = torch.tensor(weights, device=scoring)

    def evaluate(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (n,) without the norm penalty, their gradient (n, d_model), and which edits have every target
        token on top in every context, (n,) bool."""
        delta = delta.detach().requires_grad_()
        with torch.enable_grad():
            rows = self.live.run(self.model, delta.index_select(0, self.owner))
        head = self.model.head
        if self.reference is None:
            drift = rows[len(self.targets) :].detach()
            self.reference = log_probabilities(drift, head, self.buffer)
        scored = loss_rows(
            rows.detach(),
            head,
            self.targets,
            self.weights,
            self.config.kl_factor,
            self.reference,
            self.buffer,
        )
        (grad,) = torch.autograd.grad(rows, delta, scored.grad.to(rows.dtype))
        losses = torch.zeros_like(delta[:, 0]).detach().index_add_(0, self.row_owner, scored.losses.to(delta.device))
        wrong = (~scored.top1).to(delta.device, losses.dtype)
        missed = torch.zeros_like(losses).index_add_(0, self.row_owner[: len(self.targets)], wrong)
        return losses, grad, missed == 0

    def keep(self, mask: Tensor) -> None:
        """Go on with the edits where mask is True."""
        sequences = mask[self.owner].nonzero().flatten().tolist()
        self.rewrites = [self.rewrites[s] for s in sequences if s < len(self.rewrites)]
        self.live = self.live.select(self.model, sequences)
        if self.reference is not None:
            self.reference = self.reference[mask.to(self.reference.device)]
        self._index_rows(int(mask.sum()))


def _optimise_group(group: _Group, config: ValueConfig, progress: Callable[[int], None] | None) -> Values:
    hidden, n = group.hidden, len(group.hidden)
    squared = hidden.square().sum(1)
    zeros = torch.zeros_like(hidden)
    state = _State(
        index=torch.arange(n, device=hidden.device),
        delta=zeros.clone(),
        moment1=zeros.clone(),
        moment2=zeros.clone(),
        decay=config.weight_decay / squared,
        radius=config.clamp * squared.sqrt(),
        top1_steps=zeros[:, 0].clone(),
    )
    found = Values(hidden.clone(), hidden, zeros[:, 0].clone(), torch.zeros_like(state.index))
    adam = AdamSettings(config.lr)
    # The published loop runs one forward more: its loss is printed and then the loop ends.
    for step in range(1, config.steps):
        if progress is not None:
            # A batch may be abandoned here.
            progress(0)
        losses, grad, top1 = group.evaluate(state.delta)
        losses = losses + state.decay * torch.linalg.vector_norm(state.delta, dim=1)
        found.losses[state.index] = losses
        state.top1_steps = torch.where(top1, state.top1_steps + 1, torch.zeros_like(state.top1_steps))
        stop = losses < config.stop_loss
        if config.stop_after_top1 is not None:
            stop = stop | (state.top1_steps >= config.stop_after_top1)
        if bool(stop.any()):
            found.z[state.index[stop]] += state.delta[stop]
            if progress is not None:
                progress(int(stop.sum()))
            state, grad = state.keep(~stop), grad[~stop]
            if len(state.index) == 0:
                return found
            group.keep(~stop)
        sparse_adam(state.delta, grad, state.moment1, state.moment2, step, adam, state.decay, state.radius)
        found.steps[state.index] = step
    found.z[state.index] += state.delta
    if progress is not None:
        progress(len(state.index))
    return found
