"""Training of chosen columns of the down-projections, for many edits at once (FiNE, KNE).

`train_columns`: edits do not meet. Each has its own slots, losses are summed, and Adam, stop rule and norm penalty are
per edit; an edit that is finished leaves and the group is compacted. `train_shared`: one set of slots for all edits,
trained on their mean loss until every edit is finished. Both start from zero and test before a step whether to stop, so
that an edit which is true already changes nothing. What a pass saves is told in `training_pass`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    """What became of the slots of n edits.

    delta: (n_slots, d_model) float32 (float64 for float64 models), in the order of the slots
    losses, worst: (n_edits,) the loss, and -log p of the worst target token, at the last forward
    steps: (n_edits,) int64, Adam steps; curve: (n_forwards, n_edits), the loss at each, NaN once an edit is finished
    """

    delta: Tensor
    losses: Tensor
    worst: Tensor
    steps: Tensor
    curve: Tensor

    @classmethod
    def start(cls, n_slots: int, n_edits: int, n_forwards: int, d_model: int, like: Tensor) -> Trained:
        """Nothing trained yet; in the dtype and on the device of `like`."""
        losses, steps = like.new_zeros(n_edits), torch.zeros(n_edits, dtype=torch.int64, device=like.device)
        curve = like.new_full((n_forwards, n_edits), torch.nan)
        return cls(like.new_zeros(n_slots, d_model), losses, losses.clone(), steps, curve)

    def with_delta(self, delta: Tensor) -> Trained:
        """The same with other vectors."""
        return replace(self, delta=delta)


@dataclass
class _State:
    """What each slot carries through the steps: its place in the result and its edit, (n_slots,) int64, and Adam's
    tensors, (n_slots, d_model)."""

    place: Tensor
    edit: Tensor
    delta: Tensor
    moment1: Tensor
    moment2: Tensor

    def keep(self, mask: Tensor) -> _State:
        """The slots where mask is True."""
        return _State(*(getattr(self, column.name)[mask] for column in fields(self)))


def train_columns(
    model: ModelAdapter,
    sequences: Sequence[TokenSequence],
    slots: Slots,
    config: TrainConfig,
    progress: Callable[[float], None] | None = None,
) -> Trained:
    """Train the slots of all edits from zero, each edit on its own. Use inside `model.packed()`.

    sequences: one per edit, the target's tokens all among its inputs (`tokens.whole_sequences`)
    progress: called with the number of edits finished since the last call
    """
    n_edits = len(sequences)
    like = torch.zeros(0, dtype=torch.promote_types(model.dtype, torch.float32))
    found = Trained.start(len(slots), n_edits, config.steps, model.d_model, like)
    joins = lowest_layers(slots, n_edits)
    for group in _groups(sequences, joins, config.token_budget):
        place = torch.full((n_edits,), -1)
        place[torch.tensor(group)] = torch.arange(len(group))
        own = (place[slots.edits] >= 0).nonzero().flatten()
        order = own[_by_layer(slots.layers[own], place[slots.edits[own]])]
        picked = slots.pick(order)
        local = replace(picked, edits=place[picked.edits])
        with torch.no_grad():
            rows = ColumnRows.start(model, [sequences[i] for i in group], local)
        part = _train_group(rows, config, progress)
        index = torch.tensor(group)
        found.delta[order] = part.delta.cpu()
        found.losses[index], found.worst[index] = part.losses.cpu(), part.worst.cpu()
        found.steps[index], found.curve[:, index] = part.steps.cpu(), part.curve.cpu()
    return found


def train_shared(
    model: ModelAdapter,
    sequences: Sequence[TokenSequence],
    slots: Slots,
    config: TrainConfig,
    progress: Callable[[float], None] | None = None,
) -> Trained:
    """Train one set of slots on the mean loss of all edits; arguments and result as for `train_columns`.

    progress: every step counts as its share of all edits
    """
    n_edits, head = len(sequences), model.head
    like = torch.zeros(0, dtype=torch.promote_types(model.dtype, torch.float32), device=model.device)
    found, buffer = Trained.start(len(slots), n_edits, config.steps, model.d_model, like), LogitBuffer(like.dtype)
    order = slots.layers.argsort(stable=True)
    local = slots.pick(order)
    groups = _groups(sequences, [0] * n_edits, config.token_budget)
    with torch.no_grad():
        passes = [ColumnRows.start(model, [sequences[i] for i in group], local, shared=True) for group in groups]
    losses = [ColumnLoss(rows.sequences, config, head.weight.device) for rows in passes]
    delta, moment1, moment2 = (found.delta.clone() for _ in range(3))
    for step in range(1, config.steps + 1):
        if progress is not None:
            # A batch may be abandoned here.
            progress(0)
        norm = torch.linalg.vector_norm(delta)
        grad = config.norm_factor * delta / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        for group, rows, loss in zip(groups, passes, losses, strict=True):
            parts = rows.parts(delta)
            with torch.enable_grad():
                final = rows.run(parts)
            scored = loss(final.detach(), head, buffer)
            grads = torch.autograd.grad(final, list(parts.values()), scored.grad.to(final.dtype))
            grad += torch.cat([part.to(grad.device) for part in grads]) / n_edits
            found.losses[group] = scored.losses.to(norm.device) + config.norm_factor * norm
            found.worst[group] = scored.worst.to(norm.device)
        found.curve[step - 1] = found.losses
        if not bool((found.worst >= _bound(config)).any()):
            break
        sparse_adam(delta, grad, moment1, moment2, step, AdamSettings(config.lr))
        found.steps[:] = step
        if progress is not None:
            progress(n_edits / config.steps)
    found.delta[order.to(delta.device)] = delta
    if progress is not None:
        progress(n_edits * (1 - int(found.steps.max()) / config.steps))
    return Trained(*(getattr(found, column.name).cpu() for column in fields(found)))


def _bound(config: TrainConfig) -> float:
    """The loss of a token at the probability where training stops."""
    return -math.log(config.stop_probability)


def _by_layer(layers: Tensor, edits: Tensor) -> Tensor:
    """The order by layer, then edit; slots of one edit in one layer stay as they are."""
    return (layers * (int(edits.max()) + 1) + edits).argsort(stable=True) if len(edits) else edits


def _groups(sequences: Sequence[TokenSequence], joins: Sequence[int], token_budget: int) -> list[list[int]]:
    """Edits that join at similar layers, in groups of at most token_budget rows (or one edit), lowest layer first."""
    sizes = [len(sequence.ids) for sequence in sequences]
    order = sorted(range(len(sequences)), key=lambda i: (joins[i], sizes[i], i))
    return group_by_budget(sizes, token_budget, order)


def _train_group(rows: ColumnRows, config: TrainConfig, progress: Callable[[float], None] | None) -> Trained:
    model, n_edits, n_slots = rows.model, len(rows.sequences), len(rows.slots)
    device, head = model.device, model.head
    loss = ColumnLoss(rows.sequences, config, head.weight.device)
    like = torch.zeros(0, dtype=torch.promote_types(model.dtype, torch.float32), device=device)
    found = Trained.start(n_slots, n_edits, config.steps, model.d_model, like)
    state = _State(
        torch.arange(n_slots, device=device), rows.slots.edits.to(device), *(found.delta.clone() for _ in range(3))
    )
    edits, adam, buffer = torch.arange(n_edits, device=device), AdamSettings(config.lr), LogitBuffer(like.dtype)
    for step in range(1, config.steps + 1):
        if progress is not None:
            # A batch may be abandoned here.
            progress(0)
        parts = rows.parts(state.delta)
        with torch.enable_grad():
            final = rows.run(parts)
        scored = loss(final.detach(), head, buffer)
        squared = state.delta.square().sum(1)
        norm = squared.new_zeros(len(edits)).index_add_(0, state.edit, squared).sqrt()
        worst = scored.worst.to(device)
        found.losses[edits] = found.curve[step - 1, edits] = scored.losses.to(device) + config.norm_factor * norm
        found.worst[edits] = worst
        # A loss that is no number stops an edit too; it is refused when it is written.
        going = worst >= _bound(config)
        n_going = int(going.sum())
        stopped = len(edits) - n_going
        if n_going:
            grads = torch.autograd.grad(final, list(parts.values()), scored.grad.to(final.dtype))
            grad = torch.cat([part.to(device) for part in grads])
        if stopped:
            ended = ~going[state.edit]
            found.delta[state.place[ended]] = state.delta[ended]
            if progress is not None:
                progress(stopped)
            if not n_going:
                return found
            rows, loss = rows.keep(going.cpu()), loss.keep(going.cpu())
            grad, state, edits = grad[~ended], state.keep(~ended), edits[going]
            state.edit = (going.cumsum(0) - 1)[state.edit]
            norm, squared = norm[going], squared[~ended]
        # d ||D_edit|| / d delta_r = delta_r / ||D_edit||, which `sparse_adam` has as decay_r * delta_r / ||delta_r||.
        decay = config.norm_factor * squared.sqrt() / norm[state.edit].clamp_min(torch.finfo(norm.dtype).tiny)
        sparse_adam(state.delta, grad, state.moment1, state.moment2, step, adam, decay)
        found.steps[edits] = step
    found.delta[state.place] = state.delta
    if progress is not None:
        progress(len(edits))
    return found
