"""The pass of edits whose columns are changed: rows from each edit's lowest chosen layer on.

Every slot is a column of one layer with a vector that is added to it. With the columns W[:, i] + s_r delta_r
    y_l[p] = W_l a_l[p] + sum_r a_l[p, i_r] s_r delta_r        at every position p, prompt and target
Edits do not meet: each has its own slots (`sparse_delta`). An edit's rows below the feed-forward of its lowest chosen
layer are constants, computed once, so it joins the pass there, and nothing is differentiated below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.methods.columns.contributions import Slots
from fastedit.model.adapter import ModelAdapter
from fastedit.model.packed_attention import AttentionPlan, Rotary, plan_live
from fastedit.model.packed_passes import TreePass, take
from fastedit.model.tokens import TokenSequence
from fastedit.ops.sparse_delta import sparse_delta


class Entry(NamedTuple):
    """Constant rows with which edits join the pass at the feed-forward of a layer: what it adds to, its keys, and the
    down-projection's output, (n_rows, d_model), (n_rows, d_ff), (n_rows, d_model)."""

    residual: Tensor
    keys: Tensor
    output: Tensor


class Stage(NamedTuple):
    """The edits that have joined up to a layer: their rows' attention, and where each edit's rows start."""

    plan: AttentionPlan
    rotary: Rotary
    row_starts: Tensor


class LayerSlots(NamedTuple):
    """Slots of one layer, sorted by edit: their places in delta, columns, where each joined edit's slots start, and
    factors of the vectors or None."""

    places: slice
    neurons: Tensor
    starts: Tensor
    scales: Tensor | None


class ColumnRows:
    """The rows of edits from the layer on where each joins the pass.

    sequences: sorted by `joins`, the lowest chosen layer of each; slots: of these edits, sorted by layer, then edit
    entries: layer -> rows of the edits that join there, edit by edit
    shared: every slot acts on the rows of all edits; all of them join at the lowest layer of any slot
    """

    def __init__(
        self,
        model: ModelAdapter,
        sequences: Sequence[TokenSequence],
        joins: Sequence[int],
        slots: Slots,
        entries: dict[int, Entry],
        shared: bool = False,
    ) -> None:
        self.model, self.sequences, self.joins = model, list(sequences), list(joins)
        self.slots, self.entries, self.shared = slots, entries, shared
        self._stages = {layer: self._stage(layer) for layer in sorted(set(self.joins))}
        self._slots = {layer: self._layer_slots(layer) for layer in sorted(set(slots.layers.tolist()))}

    @classmethod
    def start(
        cls, model: ModelAdapter, sequences: Sequence[TokenSequence], slots: Slots, shared: bool = False
    ) -> ColumnRows:
        """Run the constant part once. `sequences` must be sorted by the lowest layer of their slots."""
        joins = lowest_layers(slots, len(sequences), shared)
        run = TreePass.start(model, [s.ids for s in sequences])
        entries: dict[int, Entry] = {}
        for layer in range(max(joins) + 1):
            mixed = model.mix(layer, run.rows, run.plan, run.rotary)
            keys = model.neurons(layer, mixed.ffn_input)
            output = model.down(layer, keys)
            rows = [r for path, join in zip(run.tree.paths, joins, strict=True) if join == layer for r in path]
            if rows:
                index = torch.tensor(rows)
                entries[layer] = Entry(*(take(part, index) for part in (mixed.residual, keys, output)))
            run = run.at(model.join(layer, mixed.residual, output))
        return cls(model, sequences, joins, slots, entries, shared)

    def parts(self, delta: Tensor) -> dict[int, Tensor]:
        """delta (n_slots, d_model), sorted as the slots, as one leaf of autograd per layer."""
        return {layer: delta[slots.places].detach().requires_grad_() for layer, slots in self._slots.items()}

    def run(self, parts: Mapping[int, Tensor]) -> Tensor:
        """What the head reads at every row of every edit, (n_rows, d_head). Differentiable in the parts."""
        model, rows, stage = self.model, torch.empty(0), None
        for layer in range(self.joins[0], model.n_layers):
            held: list[Entry] = []
            if stage is not None:
                mixed = model.mix(layer, rows, stage.plan, stage.rotary)
                keys = model.neurons(layer, mixed.ffn_input)
                held.append(Entry(mixed.residual, keys, model.down(layer, keys)))
            if layer in self.entries:
                held.append(self.entries[layer])
                stage = self._stages[layer]
            residual, keys, output = (torch.cat(part) if len(part) > 1 else part[0] for part in zip(*held, strict=True))
            if stage is not None and layer in self._slots:
                output = output + self._change(layer, keys, stage, parts[layer]).to(output.dtype)
            rows = model.join(layer, residual, output)
        return model.final_norm(rows)

    def keep(self, mask: Tensor) -> ColumnRows:
        """The edits where mask (n_edits,) is True, on the CPU, with their slots."""
        flags = mask.tolist()
        lengths = torch.tensor([len(s.ids) for s in self.sequences])
        joins = torch.tensor(self.joins)
        entries = {}
        for layer, entry in self.entries.items():
            here = joins == layer
            rows = mask[here].repeat_interleave(lengths[here])
            if bool(rows.any()):
                index = rows.nonzero().flatten()
                entries[layer] = Entry(*(take(part, index) for part in entry))
        kept = self.slots.pick(mask[self.slots.edits])
        renamed = replace(kept, edits=(mask.cumsum(0) - 1)[kept.edits])
        chosen = [s for s, keep in zip(self.sequences, flags, strict=True) if keep]
        return ColumnRows(self.model, chosen, joins[mask].tolist(), renamed, entries)

    def _change(self, layer: int, keys: Tensor, stage: Stage, delta: Tensor) -> Tensor:
        slots, device = self._slots[layer], keys.device
        row_starts = stage.row_starts.to(device)
        if self.shared:
            row_starts = row_starts[[0, -1]]
        delta = delta.to(device)
        if slots.scales is not None:
            delta = delta * slots.scales[:, None].to(delta.dtype)
        return sparse_delta(keys, row_starts, slots.neurons, slots.starts, delta)

    def _stage(self, layer: int) -> Stage:
        joined = sum(join <= layer for join in self.joins)
        lengths = [len(s.ids) for s in self.sequences[:joined]]
        device = self.model.device
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        plan = plan_live(lengths, [0] * joined).to(device)
        starts = torch.tensor([0, *accumulate(lengths)], device=self.model.layer_device(layer))
        return Stage(plan, self.model.rotary(positions), starts)

    def _layer_slots(self, layer: int) -> LayerSlots:
        here = (self.slots.layers == layer).nonzero().flatten()
        device = self.model.layer_device(layer)
        joined = sum(join <= layer for join in self.joins)
        counts = torch.bincount(self.slots.edits[here], minlength=joined)
        starts = torch.tensor([0, len(here)]) if self.shared else torch.cat([torch.zeros(1).long(), counts.cumsum(0)])
        places = slice(int(here[0]), int(here[-1]) + 1)
        scales = None if self.slots.scales is None else self.slots.scales[here].to(device)
        return LayerSlots(places, self.slots.neurons[here].to(device), starts.to(device), scales)


def lowest_layers(slots: Slots, n_edits: int, shared: bool = False) -> list[int]:
    """The lowest layer in which each edit has a slot."""
    if shared:
        return [int(slots.layers.min())] * n_edits
    lowest = torch.full((n_edits,), torch.iinfo(torch.int64).max)
    return lowest.scatter_reduce(0, slots.edits, slots.layers, "amin").tolist()
