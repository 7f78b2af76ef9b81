"""Passes over packed rows: a prefix tree of token sequences, and the live rows above the value layer.

Two savings, both exact because attention is causal. Sequences that begin alike share rows (`RowTree`), so a context
template is computed once for all edits. And when only the lookup token changes, everything before it is constant:
its keys and values are kept, and only *live* rows, from the lookup token on, are run again (`LiveRows`).

Rows move from device to device with the layers of a model that is spread over several; indices follow them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.model.adapter import ModelAdapter
from fastedit.model.packed_attention import AttentionPlan, Rotary, plan_live, plan_sequences
from fastedit.model.tokens import TokenSequence


def group_by_budget(
    sizes: Sequence[int], budget: int, order: Iterable[int] | None = None, padded: bool = False
) -> list[list[int]]:
    """Group items so that each group holds at most `budget` rows, or a single item that is larger.

    sizes: number of rows of each item
    order: indices of the items in the order in which groups are filled; None = the order of `sizes`
    padded: count a group as its number of items times its largest item, as padded attention does; else as the sum
    Returns the indices of each group. Only items that follow each other in `order` share a group."""
    groups: list[list[int]] = []
    group: list[int] = []
    total = 0
    largest = 0

    for item in range(len(sizes)) if order is None else order:
        size = sizes[item]
        n_rows = (len(group) + 1) * max(largest, size) if padded else total + size

        if not groups or n_rows > budget:
            group = []
            groups.append(group)
            total = 0
            largest = 0

        group.append(item)
        total += size
        largest = max(largest, size)

    return groups


class RowTree:
    """Unique prefixes of token sequences, one row each.

    paths: per sequence, the row of each of its tokens
    token_ids, positions: (n_rows,) int64
    """

    def __init__(self, sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> None:
        children: dict[tuple[int, int], int] = {}
        tokens: list[int] = []
        positions: list[int] = []
        self.paths: list[list[int]] = []
        owned: list[list[int]] = []
        for sequence in sequences:
            path: list[int] = []
            new: list[int] = []
            for position, token in enumerate(sequence):
                edge = (path[-1] if path else -1, token)
                row = children.get(edge)
                if row is None:
                    row = children[edge] = len(tokens)
                    tokens.append(token)
                    positions.append(position)
                    new.append(row)
                path.append(row)
            self.paths.append(path)
            owned.append(new)
        self._owned = owned
        self.n_rows = len(tokens)
        self.token_ids = torch.tensor(tokens, dtype=torch.int64, device=device)
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)

    def plan(self) -> AttentionPlan:
        """Every row attends to its ancestors and itself."""
        return plan_sequences(self._owned, self.paths, self.n_rows).to(self.positions.device)

    def last(self) -> Tensor:
        """Row of each sequence's last token, (n_sequences,) int64."""
        return torch.tensor([path[-1] for path in self.paths], device=self.positions.device)


@dataclass
class TreePass:
    """Rows of a tree on their way through the layers, so that a sweep can stop, change a weight and go on."""

    tree: RowTree
    plan: AttentionPlan
    rotary: Rotary
    rows: Tensor

    @classmethod
    def start(cls, model: ModelAdapter, sequences: Sequence[Sequence[int]]) -> TreePass:
        """Rows entering layer 0."""
        tree = RowTree(sequences, model.device)
        rows = model.embed(tree.token_ids, tree.positions)
        return cls(tree, tree.plan(), model.rotary(tree.positions), rows)

    def subset(self, model: ModelAdapter, sequences: Sequence[Sequence[int]], sources: Sequence[int]) -> TreePass:
        """The rows of `sequences` alone; sequences[i] must be a prefix of the tree's sequence sources[i]."""
        tree = RowTree(sequences, model.device)
        index = torch.zeros(tree.n_rows, dtype=torch.int64)
        for path, source in zip(tree.paths, sources, strict=True):
            index[torch.tensor(path, dtype=torch.int64)] = torch.tensor(
                self.tree.paths[source][: len(path)], dtype=torch.int64
            )
        return TreePass(tree, tree.plan(), model.rotary(tree.positions), take(self.rows, index))

    def run(self, model: ModelAdapter, layers: range) -> TreePass:
        """The rows after `layers`."""
        return self.at(model.run(self.rows, layers, self.plan, self.rotary))

    def at(self, rows: Tensor) -> TreePass:
        """The same tree with its rows elsewhere in the model."""
        return TreePass(self.tree, self.plan, self.rotary, rows)


class ValueSite(NamedTuple):
    """Where a change enters a post-norm layer, at each lookup token, both (n_sequences, d_model): what the layer adds
    to, and the down-projection's output."""

    residual: Tensor
    output: Tensor


@dataclass
class LiveRows:
    """Live rows of many sequences above one layer, with the constant keys and values before them.

    rows: (n_live, d_model), entering layer `first`; lookup: (n_sequences,) live row of each lookup token
    scored: (n_scored,) live rows whose next-token distribution is read, sequence by sequence
    site: None where a change of the value is one of the layer's output; see `ModelAdapter.post_norm`
    """

    first: int
    rows: Tensor
    positions: Tensor
    lengths: list[int]
    prefix_lengths: list[int]
    scored_counts: list[int]
    lookup: Tensor
    scored: Tensor
    plan: AttentionPlan
    rotary: Rotary
    site: ValueSite | None = None

    def run(self, model: ModelAdapter, change: Tensor) -> Tensor:
        """Add `change` (n_sequences, d_model) to the values at the lookup tokens and run all layers from `first` on;
        returns what the head reads at the scored positions, (n_scored, d_head). Differentiable in `change`."""
        change = change.to(self.rows.device, self.rows.dtype)
        if self.site is None:
            rows = self.rows.index_add(0, self.lookup, change)
        else:
            changed = model.join(self.first - 1, self.site.residual, self.site.output + change)
            rows = self.rows.index_copy(0, self.lookup, changed)
        # The change is added before rounding to the dtype of the layers above.
        rows = rows.to(model.dtype)
        layers = range(self.first, model.n_layers)
        if not layers:
            return model.final_norm(take(rows, self.scored))
        return model.final_norm(model.run(rows, layers, self.plan, self.rotary, tail=self.scored))

    def select(self, model: ModelAdapter, keep: Sequence[int]) -> LiveRows:
        """The same for the sequences `keep` (ascending) alone."""
        starts = [0, *accumulate(self.lengths)]
        rows = [row for s in keep for row in range(starts[s], starts[s + 1])]
        first_scored = [0, *accumulate(self.scored_counts)]
        local = self.scored.tolist()
        picked = [[row - starts[s] for row in local[first_scored[s] : first_scored[s + 1]]] for s in keep]
        index, chosen = torch.tensor(rows), torch.tensor(list(keep))
        n_seq = len(self.lengths)
        prefix = {
            layer: (_sequences(keys, n_seq, chosen), _sequences(values, n_seq, chosen))
            for layer, (keys, values) in self.plan.prefix.items()
        }
        return _assemble(
            model,
            self.first,
            take(self.rows, index),
            take(self.positions, index),
            [self.lengths[s] for s in keep],
            [self.prefix_lengths[s] for s in keep],
            picked,
            prefix,
            max(self.prefix_lengths, default=0),
            None if self.site is None else ValueSite(*(take(part, chosen) for part in self.site)),
        )


def live_rows(
    model: ModelAdapter, sequences: Sequence[TokenSequence], layer: int, upper: ModelAdapter | None = None
) -> tuple[LiveRows, Tensor]:
    """Run everything that a change of the value of `layer` at the lookup token cannot touch, once.

    upper: what runs the layers above (`ModelAdapter.upper_copy`); default: model
    Returns the live rows above `layer`, and the present value at each lookup token, (n_sequences, d_model): the
    hidden state after the layer, or the down-projection's output where the model is post-norm."""
    upper = upper or model
    below = TreePass.start(model, [sequence.ids for sequence in sequences]).run(model, range(layer))
    mixed = model.mix(layer, below.rows, below.plan, below.rotary)
    output = model.ffn_output(layer, mixed.ffn_input)
    below = below.at(model.join(layer, mixed.residual, output))
    at_lookup = torch.tensor([path[s.lookup] for path, s in zip(below.tree.paths, sequences, strict=True)])
    site = ValueSite(take(mixed.residual, at_lookup), take(output, at_lookup)) if model.post_norm else None
    hidden = take(below.rows, at_lookup) if site is None else site.output
    prefixes = [sequence.ids[: sequence.lookup] for sequence in sequences]
    with_prefix = [s for s, prefix in enumerate(prefixes) if prefix]
    prefix: dict[int, tuple[Tensor, Tensor]] = {}
    if with_prefix and layer + 1 < model.n_layers:
        constant = below.subset(upper, [prefixes[s] for s in with_prefix], with_prefix)
        constant = constant.at(constant.rows.to(upper.dtype))
        prefix = prefix_states(upper, constant, layer + 1, len(sequences), with_prefix)
    live = [path[sequence.lookup :] for path, sequence in zip(below.tree.paths, sequences, strict=True)]
    index = torch.tensor([row for rows in live for row in rows])
    assembled = _assemble(
        upper,
        layer + 1,
        take(below.rows, index),
        take(below.tree.positions, index),
        [len(rows) for rows in live],
        [len(tokens) for tokens in prefixes],
        [[position - sequence.lookup for position in sequence.scored] for sequence in sequences],
        prefix,
        max(len(tokens) for tokens in prefixes),
        site,
    )
    return assembled, hidden.to(model.device)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], on the device of the rows."""
    return rows[index.to(rows.device)]


def _sequences(part: Tensor, n_sequences: int, chosen: Tensor) -> Tensor:
    """Keys or values (n_kv_heads * n_sequences, length, head_dim), head-major, of the chosen sequences."""
    return part.view(-1, n_sequences, *part.shape[1:])[:, chosen.to(part.device)].flatten(0, 1)


def prefix_states(
    model: ModelAdapter, constant: TreePass, first: int, n_sequences: int, with_prefix: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of the prefix rows for every layer from `first`, padded per sequence."""
    width = max(len(path) for path in constant.tree.paths)
    index = torch.zeros(n_sequences, width, dtype=torch.int64)
    for s, path in zip(with_prefix, constant.tree.paths, strict=True):
        index[s, : len(path)] = torch.tensor(path)
    flat = index.flatten()
    prefix: dict[int, tuple[Tensor, Tensor]] = {}
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    rows, plan = constant.rows, constant.plan.collecting(kept)
    for layer in range(first, model.n_layers):
        mixed = model.mix(layer, rows, plan, constant.rotary)
        if layer + 1 < model.n_layers:
            rows = model.feed_forward(layer, mixed)
        key, value = kept.pop(layer)
        flat = flat.to(key.device)
        prefix[layer] = (
            key.index_select(1, flat).view(-1, width, key.shape[-1]),
            value.index_select(1, flat).view(-1, width, value.shape[-1]),
        )
    return prefix


def _assemble(
    model: ModelAdapter,
    first: int,
    rows: Tensor,
    positions: Tensor,
    lengths: list[int],
    prefix_lengths: list[int],
    scored: list[list[int]],
    prefix: dict[int, tuple[Tensor, Tensor]],
    prefix_width: int,
    site: ValueSite | None,
) -> LiveRows:
    """Plan the live rows; `scored` is relative to each sequence's lookup token."""
    width = max(prefix_lengths)
    # A selection may no longer hold the longest prefix: the padding beyond the new longest is cut.
    if width == 0:
        prefix = {}
    elif width < prefix_width:
        prefix = {k: (a[:, :width].contiguous(), b[:, :width].contiguous()) for k, (a, b) in prefix.items()}
    plan = plan_live(lengths, prefix_lengths, prefix).to(rows.device)
    starts = [0, *accumulate(lengths)][:-1]
    flat = [start + position for start, local in zip(starts, scored, strict=True) for position in local]
    return LiveRows(
        first,
        rows,
        positions,
        lengths,
        prefix_lengths,
        [len(local) for local in scored],
        torch.tensor(starts, device=rows.device),
        torch.tensor(flat, device=model.layer_device(model.n_layers - 1)),
        plan,
        model.rotary(positions),
        site,
    )
