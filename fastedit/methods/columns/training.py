"""Training of chosen columns of the down-projections, for many edits at once (FiNE, KNE).

`train_columns` trains each edit's own slots: losses are summed, and Adam, stop rule and norm penalty act per edit. An
edit that is finished leaves its group. `train_shared` trains one set of slots for all edits on their mean loss, until
every edit is finished. Both start from zero and test the stop rule before each step, so an edit that is already true
changes nothing. See `training_pass` for what one pass saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastedit.methods.columns.config import TrainConfig
from fastedit.methods.columns.contributions import Slots
from fastedit.methods.columns.losses import ColumnLoss
from fastedit.methods.columns.training_pass import ColumnRows, lowest_layers
from fastedit.model.adapter import ModelAdapter
from fastedit.model.logits import LogitBuffer
from fastedit.model.packed_passes import group_by_budget
from fastedit.model.tokens import TokenSequence
from fastedit.ops.sparse_adam import AdamSettings, sparse_adam


@dataclass(frozen=True)
class Trained:
    """The trained slots of n edits, float32 (float64 for float64 models).

    delta: (n_slots, d_model), the vectors in the order of the slots
    losses: (n_edits,) loss at the last forward
    worst: (n_edits,) -log p of the worst target token at the last forward
    steps: (n_edits,) int64, Adam steps taken
    curve: (n_forwards, n_edits) loss at each forward, NaN once an edit is finished
    """

    delta: Tensor
    losses: Tensor
    worst: Tensor
    steps: Tensor
    curve: Tensor

    @classmethod
    def start(cls, n_slots: int, n_edits: int, n_forwards: int, d_model: int, like: Tensor) -> Trained:
        """Before the first step, with the dtype and device of `like`."""
        return cls(
            delta=like.new_zeros(n_slots, d_model),
            losses=like.new_zeros(n_edits),
            worst=like.new_zeros(n_edits),
            steps=torch.zeros(n_edits, dtype=torch.int64, device=like.device),
            curve=like.new_full((n_forwards, n_edits), torch.nan),
        )

    def with_delta(self, delta: Tensor) -> Trained:
        """A copy with other vectors."""
        return replace(self, delta=delta)

    def fill(self, slots: Tensor, edits: Tensor, part: Trained) -> None:
        """Copy the results of a group of edits. slots, edits: int64, where they belong"""
        self.delta[slots] = part.delta.cpu()
        self.losses[edits] = part.losses.cpu()
        self.worst[edits] = part.worst.cpu()
        self.steps[edits] = part.steps.cpu()
        self.curve[:, edits] = part.curve.cpu()

    def cpu(self) -> Trained:
        """A copy on the CPU."""
        return Trained(*(getattr(self, column.name).cpu() for column in fields(self)))


@dataclass
class _AdamState:
    """What the slots of unfinished edits carry from step to step.

    place: (n_slots,) int64, place of the slot in the result; edit: (n_slots,) int64, its edit among the unfinished ones
    delta, moment1, moment2: (n_slots, d_model), the vectors and Adam's two moments
    """

    place: Tensor
    edit: Tensor
    delta: Tensor
    moment1: Tensor
    moment2: Tensor

    def keep(self, mask: Tensor) -> _AdamState:
        """The slots where mask (n_slots,) is True."""
        return _AdamState(*(getattr(self, column.name)[mask] for column in fields(self)))


def train_columns(
    model: ModelAdapter,
    sequences: Sequence[TokenSequence],
    slots: Slots,
    config: TrainConfig,
    progress: Callable[[float], None] | None = None,
) -> Trained:
    """Train the slots of every edit from zero, each edit on its own. Returns tensors on the CPU; the model is not
    changed. Use inside `model.packed()`.

    sequences: one per edit, with every target token among the inputs (`tokens.whole_sequences`)
    progress: called with the number of edits finished since the last call, also with 0 before every step
    """
    n_edits = len(sequences)
    like = torch.zeros(0, dtype=torch.promote_types(model.dtype, torch.float32))
    trained = Trained.start(len(slots), n_edits, config.steps, model.d_model, like)

    joins = lowest_layers(slots, n_edits)
    for group in _groups(sequences, joins, config.token_budget):
        places, local = _group_slots(slots, group, n_edits)
        with torch.no_grad():
            rows = ColumnRows.start(model, [sequences[i] for i in group], local)
        trained.fill(places, torch.tensor(group), _train_group(rows, config, progress))
    return trained


def train_shared(
    model: ModelAdapter,
    sequences: Sequence[TokenSequence],
    slots: Slots,
    config: TrainConfig,
    progress: Callable[[float], None] | None = None,
) -> Trained:
    """Train one set of slots on the mean loss of all edits; arguments and result as for `train_columns`.

    progress: called with n_edits / config.steps after every step, and with the rest at the end
    """
    report = progress or (lambda n: None)
    n_edits = len(sequences)
    head = model.head
    like = torch.zeros(0, dtype=torch.promote_types(model.dtype, torch.float32), device=model.device)
    trained = Trained.start(len(slots), n_edits, config.steps, model.d_model, like)

    order = slots.layers.argsort(stable=True)
    local = slots.pick(order)
    groups = _groups(sequences, [0] * n_edits, config.token_budget)
    with torch.no_grad():
        passes = [ColumnRows.start(model, [sequences[i] for i in group], local, shared=True) for group in groups]
    losses = [ColumnLoss(rows.sequences, config, head.weight.device) for rows in passes]

    delta, moment1, moment2 = (trained.delta.clone() for _ in range(3))
    adam = AdamSettings(config.lr)
    buffer = LogitBuffer(like.dtype)
    for step in range(1, config.steps + 1):
        # The callback may raise here, to abandon the batch.
        report(0)
        norm = torch.linalg.vector_norm(delta)
        grad = config.norm_factor * delta / norm.clamp_min(torch.finfo(norm.dtype).tiny)

        for group, rows, loss in zip(groups, passes, losses, strict=True):
            parts = rows.parts(delta)
            with torch.enable_grad():
                final = rows.run(parts)
            scored = loss(final.detach(), head, buffer)
            grad += _slot_grad(final, parts, scored.grad, grad.device) / n_edits
            trained.losses[group] = scored.losses.to(norm.device) + config.norm_factor * norm
            trained.worst[group] = scored.worst.to(norm.device)
        trained.curve[step - 1] = trained.losses

        if not bool((trained.worst >= _stop_loss(config)).any()):
            break
        sparse_adam(delta, grad, moment1, moment2, step, adam)
        trained.steps[:] = step
        report(n_edits / config.steps)

    trained.delta[order.to(delta.device)] = delta
    report(n_edits * (1 - int(trained.steps.max()) / config.steps))
    return trained.cpu()


def _train_group(rows: ColumnRows, config: TrainConfig, progress: Callable[[float], None] | None) -> Trained:
    """Train the slots of one group of edits, each edit on its own; on the model's device."""
    report = progress or (lambda n: None)
    model = rows.model
    device = model.device
    head = model.head
    n_slots, n_edits = len(rows.slots), len(rows.sequences)
    like = torch.zeros(0, dtype=torch.promote_types(model.dtype, torch.float32), device=device)
    trained = Trained.start(n_slots, n_edits, config.steps, model.d_model, like)

    loss = ColumnLoss(rows.sequences, config, head.weight.device)
    zeros = (trained.delta.clone() for _ in range(3))
    state = _AdamState(torch.arange(n_slots, device=device), rows.slots.edits.to(device), *zeros)
    edits = torch.arange(n_edits, device=device)
    adam = AdamSettings(config.lr)
    buffer = LogitBuffer(like.dtype)
    for step in range(1, config.steps + 1):
        # The callback may raise here, to abandon the batch.
        report(0)
        parts = rows.parts(state.delta)
        with torch.enable_grad():
            final = rows.run(parts)
        scored = loss(final.detach(), head, buffer)

        squared = state.delta.square().sum(1)
        norm = squared.new_zeros(len(edits)).index_add_(0, state.edit, squared).sqrt()
        losses = scored.losses.to(device) + config.norm_factor * norm
        worst = scored.worst.to(device)
        trained.losses[edits] = trained.curve[step - 1, edits] = losses
        trained.worst[edits] = worst

        # A loss that is NaN compares False and ends its edit too; the edit is refused when it is written.
        going = worst >= _stop_loss(config)
        n_going = int(going.sum())
        if n_going == 0:
            trained.delta[state.place] = state.delta
            report(len(edits))
            return trained

        grad = _slot_grad(final, parts, scored.grad, device)
        if n_going < len(edits):
            slots_going = going[state.edit]
            trained.delta[state.place[~slots_going]] = state.delta[~slots_going]
            report(len(edits) - n_going)

            rows, loss = rows.keep(going.cpu()), loss.keep(going.cpu())
            state, grad, squared = state.keep(slots_going), grad[slots_going], squared[slots_going]
            edits, norm = edits[going], norm[going]
            state.edit = (going.cumsum(0) - 1)[state.edit]

        # d ||D_edit|| / d delta_r = delta_r / ||D_edit||, which `sparse_adam` has as decay_r * delta_r / ||delta_r||.
        decay = config.norm_factor * squared.sqrt() / norm[state.edit].clamp_min(torch.finfo(norm.dtype).tiny)
        sparse_adam(state.delta, grad, state.moment1, state.moment2, step, adam, decay)
        trained.steps[edits] = step

    trained.delta[state.place] = state.delta
    report(len(edits))
    return trained


def _slot_grad(final: Tensor, parts: Mapping[int, Tensor], grad: Tensor, device: torch.device) -> Tensor:
    """The gradient in the vectors of all slots, (n_slots, d_model), sorted by layer.

    final: what the head reads; parts: each layer's vectors; grad: gradient of the losses in `final`"""
    grads = torch.autograd.grad(final, list(parts.values()), grad.to(final.dtype))
    return torch.cat([part.to(device) for part in grads])


def _stop_loss(config: TrainConfig) -> float:
    """The loss of a token at the probability where training stops."""
    return -math.log(config.stop_probability)


def _group_slots(slots: Slots, group: Sequence[int], n_edits: int) -> tuple[Tensor, Slots]:
    """A group's slots, sorted by layer, then by edit, with their edits counted within the group.

    Slots of one edit in one layer keep their order. Also returns their places in `slots`, int64."""
    place_in_group = torch.full((n_edits,), -1)
    place_in_group[torch.tensor(group)] = torch.arange(len(group))
    edits = place_in_group[slots.edits]

    places = (edits >= 0).nonzero().flatten()
    places = places[(slots.layers[places] * len(group) + edits[places]).argsort(stable=True)]
    return places, replace(slots.pick(places), edits=edits[places])


def _groups(sequences: Sequence[TokenSequence], joins: Sequence[int], token_budget: int) -> list[list[int]]:
    """Edits that join at similar layers, in groups of at most token_budget rows (or one edit), lowest layer first."""
    sizes = [len(sequence.ids) for sequence in sequences]
    order = sorted(range(len(sequences)), key=lambda i: (joins[i], sizes[i], i))
    return group_by_budget(sizes, token_budget, order)
