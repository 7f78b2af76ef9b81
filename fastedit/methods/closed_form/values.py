"""Optimisation of the values of many edits at once.

For every edit a vector delta is added at the lookup token to the output of the value layer (in a post-norm model, to
the output of its down-projection). Adam lowers
    mean_q [ -(1/T) sum_t log p(y_t | r_q, y_<t) ]  +  kl_factor * KL(p_now || p_start)  +  decay * ||delta|| / ||h0||^2
over the contexts r_q, one per template, with the KL at the subject's last token of "{subject} is a". The value is
z = h0 + delta. This is the procedure of MEMIT (Meng et al. 2023), which AlphaEdit, NSE and NMKE share.

Edits do not influence each other. Losses are summed, so each row has the gradient that it would have alone, and Adam,
clamp and stop rule act per row.

Three exact savings: only live rows are run again (`model.packed_passes`); logits are computed at scored positions only;
the forward of the last step is not run, since it could only change a printed loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.methods.closed_form.config import ValueConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.model.logits import LogitBuffer, log_probabilities, loss_rows
from fastedit.model.packed_passes import group_by_budget, live_rows
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
    stream: (n, d_model) float32, in a post-norm model the residual stream to which the value layer added; else None
    """

    z: Tensor
    hidden: Tensor
    losses: Tensor
    steps: Tensor
    stream: Tensor | None = None

    @classmethod
    def zeros(cls, n_edits: int, d_model: int, with_stream: bool = False) -> Values:
        """Zeros on the CPU, to be filled group by group."""
        return cls(
            torch.zeros(n_edits, d_model),
            torch.zeros(n_edits, d_model),
            torch.zeros(n_edits),
            torch.zeros(n_edits, dtype=torch.int64),
            torch.zeros(n_edits, d_model) if with_stream else None,
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Values:
        """The inverse of `tensors`. Raises KeyError for a missing name."""
        stream = tensors.get("stream")
        return cls(tensors["values"], tensors["hidden"], tensors["losses"], tensors["steps"], stream)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under the names that run directories store; z is stored as "values"."""
        tensors = {"values": self.z, "hidden": self.hidden, "losses": self.losses, "steps": self.steps}
        return tensors if self.stream is None else {**tensors, "stream": self.stream}

    def fill(self, index: Tensor, part: Values) -> None:
        """Copy the values of `part` to the edits `index`, int64."""
        self.z[index] = part.z.cpu()
        self.hidden[index] = part.hidden.cpu()
        self.losses[index] = part.losses.cpu()
        self.steps[index] = part.steps.cpu()
        if self.stream is not None and part.stream is not None:
            self.stream[index] = part.stream.cpu()


def optimise_values(
    model: ModelAdapter,
    edits: Sequence[Edit],
    templates: Sequence[str],
    layer: int,
    config: ValueConfig,
    progress: Callable[[float], None] | None = None,
    upper: ModelAdapter | None = None,
) -> Values:
    """Optimise the values of all edits at `layer`, on the model's present weights. The model is not changed.

    templates: context templates with one `{}` each, the first of them "{}"
    layer: the value layer, the last edited one
    progress: called with the number of edits finished since the last call, also with 0 before every step
    upper: runs the layers above `layer`, see `upper_layers`, which makes it by default
    Returns tensors on the CPU, one row per edit. Raises ValueError for a target without a token of its own.

    Edits are sorted by length and optimised in groups of at most `config.token_budget` live rows."""
    upper = upper or upper_layers(model, layer, config)
    rewrites = rewrite_sequences(model.tokenizer, edits, templates)
    subjects = subject_sequences(model.tokenizer, edits)
    sequences = [[*rows, subject] for rows, subject in zip(rewrites, subjects, strict=True)]

    values = Values.zeros(len(edits), model.d_model, with_stream=model.post_norm)
    with model.packed():
        for group in group_by_length(sequences, config.token_budget):
            loss = ValueLoss(model, [sequences[i] for i in group], layer, config, upper)
            values.fill(torch.tensor(group), _optimise_group(loss, config, progress))
    return values


def upper_layers(model: ModelAdapter, layer: int, config: ValueConfig) -> ModelAdapter:
    """The adapter that runs the layers above the value layer: `model` itself, or a copy of them in `config.dtype`.

    No edit changes these layers, so one copy serves a whole stream."""
    dtype = upper_dtype(model, config)
    return model if dtype is None else model.upper_copy(layer + 1, dtype)


def upper_dtype(model: ModelAdapter, config: ValueConfig) -> torch.dtype | None:
    """The dtype of the copy that `upper_layers` makes; None where it makes none."""
    emulated = model.dtype == torch.float16 and model.device.type == "cpu"
    dtype = ("float32" if emulated else "model") if config.dtype == "auto" else config.dtype
    return None if dtype == "model" else getattr(torch, dtype)


def group_by_length(sequences: Sequence[Sequence[TokenSequence]], token_budget: int) -> list[list[int]]:
    """Indices of edits in groups of similar length, each of at most token_budget live rows (or one edit).

    sequences: per edit all its sequences; a sequence's live rows begin at its lookup token"""
    longest = [max(len(s.ids) - s.lookup for s in rows) for rows in sequences]
    total = [sum(len(s.ids) - s.lookup for s in rows) for rows in sequences]
    order = sorted(range(len(sequences)), key=lambda i: (longest[i], total[i], i))
    return group_by_budget(total, token_budget, order)


@dataclass
class _AdamState:
    """What the unfinished edits of a group carry from step to step, one row per edit.

    index: (n,) int64, place of the edit in its group
    delta, moment1, moment2: (n, d_model) float32, the vector and Adam's two moments
    decay: (n,) float32, weight of ||delta|| in the loss
    radius: (n,) float32, bound of ||delta||
    top1_steps: (n,) float32, steps in a row with every target token ranked first
    """

    index: Tensor
    delta: Tensor
    moment1: Tensor
    moment2: Tensor
    decay: Tensor
    radius: Tensor
    top1_steps: Tensor

    @classmethod
    def start(cls, hidden: Tensor, config: ValueConfig) -> _AdamState:
        """delta = 0. hidden: h0, (n, d_model)"""
        squared = hidden.square().sum(1)
        zeros = torch.zeros_like(hidden)
        return cls(
            index=torch.arange(len(hidden), device=hidden.device),
            delta=zeros.clone(),
            moment1=zeros.clone(),
            moment2=zeros.clone(),
            decay=config.weight_decay / squared,
            radius=config.clamp * squared.sqrt(),
            top1_steps=zeros[:, 0].clone(),
        )

    def keep(self, mask: Tensor) -> _AdamState:
        """The edits where mask (n,) is True."""
        return _AdamState(*(getattr(self, column.name)[mask] for column in fields(self)))


class ValueScores(NamedTuple):
    """Scores of n edits.

    losses: (n,) float32, without the norm penalty
    grad: (n, d_model), gradient of the losses' sum in delta
    top1: (n,) bool, edits with every target token ranked first in every context
    """

    losses: Tensor
    grad: Tensor
    top1: Tensor


class ValueLoss:
    """The loss of edits that are optimised together, as a function of delta.

    sequences: per edit its rewriting sequences, one per template, then its subject sequence
    layer: the value layer; upper: runs the layers above it
    hidden: h0, (n, d_model) float32; stream: see `Values`
    """

    def __init__(
        self,
        model: ModelAdapter,
        sequences: Sequence[Sequence[TokenSequence]],
        layer: int,
        config: ValueConfig,
        upper: ModelAdapter,
    ) -> None:
        self.model = upper
        self.config = config
        self.n_templates = len(sequences[0]) - 1
        self.rewrites = [sequence for rows in sequences for sequence in rows[:-1]]
        subjects = [rows[-1] for rows in sequences]
        with torch.no_grad():
            self.live, hidden = live_rows(model, [*self.rewrites, *subjects], layer, upper)
        plain = slice(0, len(self.rewrites), self.n_templates)
        self.hidden = hidden[plain].float()
        self.stream = None if self.live.site is None else self.live.site.residual[plain].float()

        self.reference: Tensor | None = None
        self.buffer = LogitBuffer()
        self._index_rows(len(sequences))

    def _index_rows(self, n_edits: int) -> None:
        """Which edit each sequence and each scored row belongs to, and the targets with their weights."""
        device = self.model.device
        head_device = self.model.head.weight.device

        edits = torch.arange(n_edits)
        self.owner = torch.cat([edits.repeat_interleave(self.n_templates), edits]).to(device)
        counts = torch.tensor(self.live.scored_counts).to(device)
        self.row_owner = self.owner.repeat_interleave(counts, output_size=sum(self.live.scored_counts))

        self.targets = torch.tensor([token for s in self.rewrites for token in s.targets], device=head_device)
        weights = [1 / (self.n_templates * len(s.targets)) for s in self.rewrites for _ in s.targets]
        self.weights = torch.tensor(weights, device=head_device)

    def evaluate(self, delta: Tensor) -> ValueScores:
        """Scores with `delta` (n, d_model) added. The first call sets what the KL is measured from."""
        delta = delta.detach().requires_grad_()
        with torch.enable_grad():
            rows = self.live.run(self.model, delta.index_select(0, self.owner))

        head = self.model.head
        if self.reference is None:
            subject_rows = rows[len(self.targets) :].detach()
            self.reference = log_probabilities(subject_rows, head, self.buffer)
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
        n_wrong = torch.zeros_like(losses).index_add_(0, self.row_owner[: len(self.targets)], wrong)
        return ValueScores(losses, grad, n_wrong == 0)

    def keep(self, mask: Tensor) -> None:
        """Drop the edits where mask (n,) is False."""
        sequences = mask[self.owner].nonzero().flatten().tolist()
        self.rewrites = [self.rewrites[s] for s in sequences if s < len(self.rewrites)]
        self.live = self.live.select(self.model, sequences)
        if self.reference is not None:
            self.reference = self.reference[mask.to(self.reference.device)]
        self._index_rows(int(mask.sum()))


def _optimise_group(loss: ValueLoss, config: ValueConfig, progress: Callable[[float], None] | None) -> Values:
    """Run Adam on the edits of one loss; an edit that is finished leaves the group."""
    report = progress or (lambda n: None)
    hidden = loss.hidden
    state = _AdamState.start(hidden, config)
    values = Values(hidden.clone(), hidden, torch.zeros_like(hidden[:, 0]), torch.zeros_like(state.index), loss.stream)
    adam = AdamSettings(config.lr)

    # The published loop runs one forward more, prints its loss and ends.
    for step in range(1, config.steps):
        # The callback may raise here, to abandon the batch.
        report(0)
        losses, grad, top1 = loss.evaluate(state.delta)
        losses = losses + state.decay * torch.linalg.vector_norm(state.delta, dim=1)
        values.losses[state.index] = losses
        state.top1_steps = torch.where(top1, state.top1_steps + 1, torch.zeros_like(state.top1_steps))

        stop = losses < config.stop_loss
        if config.stop_after_top1 is not None:
            stop = stop | (state.top1_steps >= config.stop_after_top1)
        if bool(stop.any()):
            values.z[state.index[stop]] += state.delta[stop]
            report(int(stop.sum()))
            state, grad = state.keep(~stop), grad[~stop]
            if len(state.index) == 0:
                return values
            loss.keep(~stop)

        sparse_adam(state.delta, grad, state.moment1, state.moment2, step, adam, state.decay, state.radius)
        values.steps[state.index] = step

    values.z[state.index] += state.delta
    report(len(state.index))
    return values
