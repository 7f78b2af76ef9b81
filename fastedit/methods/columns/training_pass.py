"""The pass of edits whose columns are trained: rows from each edit's lowest chosen layer on.

A slot is a column W_l[:, i] with a factor s and a vector delta, trained as W_l[:, i] + s delta. The slots r of a layer
change its down-projection's output to
    y_l[p] = W_l a_l[p] + sum_r a_l[p, i_r] s_r delta_r        at every position p of prompt and target
Edits do not influence each other: each has its own slots (`sparse_delta`). Below the feed-forward block of its lowest
chosen layer an edit's rows are constant. They are computed once, the edit joins the pass there, and nothing below is
differentiated.
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
    """Rows at the feed-forward block of a layer, constant for edits that join the pass there.

    residual: (n_rows, d_model), what the block's output is added to
    keys: (n_rows, d_ff); output: (n_rows, d_model), the down-projection's input and output
    """

    residual: Tensor
    keys: Tensor
    output: Tensor


class Stage(NamedTuple):
    """The edits that have joined the pass up to a layer.

    plan, rotary: attention of their rows
    row_starts: (n_joined + 1,) int64, where each edit's rows start, and their number
    """

    plan: AttentionPlan
    rotary: Rotary
    row_starts: Tensor


class LayerSlots(NamedTuple):
    """The slots of one layer, sorted by edit, on the layer's device.

    places: where their vectors lie in delta
    neurons: (n,) int64; scales: (n,) factors of the vectors, or None
    starts: (n_joined + 1,) int64, where each joined edit's slots start, and their number
    """

    places: slice
    neurons: Tensor
    starts: Tensor
    scales: Tensor | None


class ColumnRows:
    """The rows of edits, each from the layer on where it joins the pass.

    sequences: sorted by `joins`
    joins: the lowest chosen layer of each edit
    slots: of these edits, sorted by layer, then by edit
    entries: layer -> rows of the edits that join there, edit by edit
    shared: every slot acts on the rows of all edits, and all edits join at the lowest layer of any slot
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
        self.model = model
        self.sequences = list(sequences)
        self.joins = list(joins)
        self.slots = slots
        self.entries = entries
        self.shared = shared
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
                entries[layer] = Entry(take(mixed.residual, index), take(keys, index), take(output, index))
            run = run.at(model.join(layer, mixed.residual, output))
        return cls(model, sequences, joins, slots, entries, shared)

    def parts(self, delta: Tensor) -> dict[int, Tensor]:
        """The vectors of each layer's slots as a leaf of autograd. delta: (n_slots, d_model), sorted as the slots"""
        return {layer: delta[slots.places].detach().requires_grad_() for layer, slots in self._slots.items()}

    def run(self, parts: Mapping[int, Tensor]) -> Tensor:
        """What the head reads at every row of every edit, (n_rows, d_head). Differentiable in the parts."""
        model = self.model
        rows = torch.empty(0)
        stage: Stage | None = None

        for layer in range(self.joins[0], model.n_layers):
            running: list[Entry] = []
            if stage is not None:
                mixed = model.mix(layer, rows, stage.plan, stage.rotary)
                keys = model.neurons(layer, mixed.ffn_input)
                running.append(Entry(mixed.residual, keys, model.down(layer, keys)))
            if layer in self.entries:
                running.append(self.entries[layer])
                stage = self._stages[layer]

            residual, keys, output = _joined(running)
            if stage is not None and layer in self._slots:
                output = output + self._change(layer, keys, stage, parts[layer]).to(output.dtype)
            rows = model.join(layer, residual, output)
        return model.final_norm(rows)

    def keep(self, mask: Tensor) -> ColumnRows:
        """The edits where mask (n_edits,) bool, on the CPU, is True, with their slots."""
        lengths = torch.tensor([len(s.ids) for s in self.sequences])
        joins = torch.tensor(self.joins)

        entries: dict[int, Entry] = {}
        for layer, entry in self.entries.items():
            here = joins == layer
            rows = mask[here].repeat_interleave(lengths[here])
            if bool(rows.any()):
                index = rows.nonzero().flatten()
                entries[layer] = Entry(*(take(part, index) for part in entry))

        remaining = self.slots.pick(mask[self.slots.edits])
        renumbered = replace(remaining, edits=(mask.cumsum(0) - 1)[remaining.edits])
        sequences = [s for s, keep in zip(self.sequences, mask.tolist(), strict=True) if keep]
        return ColumnRows(self.model, sequences, joins[mask].tolist(), renumbered, entries)

    def _change(self, layer: int, keys: Tensor, stage: Stage, delta: Tensor) -> Tensor:
        """What the slots of a layer add to its output, (n_rows, d_model). delta: their vectors"""
        slots = self._slots[layer]
        device = keys.device
        row_starts = stage.row_starts.to(device)
        if self.shared:
            row_starts = row_starts[[0, -1]]

        delta = delta.to(device)
        if slots.scales is not None:
            delta = delta * slots.scales[:, None].to(delta.dtype)
        return sparse_delta(keys, row_starts, slots.neurons, slots.starts, delta)

    def _stage(self, layer: int) -> Stage:
        joined = self._n_joined(layer)
        lengths = [len(s.ids) for s in self.sequences[:joined]]
        device = self.model.device
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        plan = plan_live(lengths, [0] * joined).to(device)
        starts = torch.tensor([0, *accumulate(lengths)], device=self.model.layer_device(layer))
        return Stage(plan, self.model.rotary(positions), starts)

    def _layer_slots(self, layer: int) -> LayerSlots:
        here = (self.slots.layers == layer).nonzero().flatten()
        if self.shared:
            starts = torch.tensor([0, len(here)])
        else:
            counts = torch.bincount(self.slots.edits[here], minlength=self._n_joined(layer))
            starts = torch.cat([torch.zeros(1).long(), counts.cumsum(0)])

        device = self.model.layer_device(layer)
        places = slice(int(here[0]), int(here[-1]) + 1)
        scales = None if self.slots.scales is None else self.slots.scales[here].to(device)
        return LayerSlots(places, self.slots.neurons[here].to(device), starts.to(device), scales)

    def _n_joined(self, layer: int) -> int:
        """Number of edits that have joined the pass up to `layer`."""
        return sum(join <= layer for join in self.joins)


def _joined(entries: Sequence[Entry]) -> Entry:
    """The rows of all entries, one entry after the other."""
    if len(entries) == 1:
        return entries[0]
    return Entry(*(torch.cat(part) for part in zip(*entries, strict=True)))


def lowest_layers(slots: Slots, n_edits: int, shared: bool = False) -> list[int]:
    """The lowest layer in which each edit has a slot; with `shared` that of all slots, for every edit."""
    if shared:
        return [int(slots.layers.min())] * n_edits
    lowest = torch.full((n_edits,), torch.iinfo(torch.int64).max)
    return lowest.scatter_reduce(0, slots.edits, slots.layers, "amin").tolist()
