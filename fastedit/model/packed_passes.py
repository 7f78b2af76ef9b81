"""Passes over packed rows: a prefix tree of token sequences, and the live rows above the value layer.

Two savings, both exact because attention is causal:
- Sequences that begin alike share rows (`RowTree`), so that a context template is computed once for all edits.
- While the value at the lookup token is optimised, everything before that token is constant. Its keys and values are
  computed once, and only the *live* rows, from the lookup token on, run again (`LiveRows`).

In a model that is spread over several devices, rows move with the layers and indices move to the rows.
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
    """The distinct prefixes of token sequences, one row each.

    sequences: token ids
    paths: per sequence, the row of each of its tokens
    token_ids, positions: (n_rows,) int64
    """

    def __init__(self, sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> None:
        self.paths: list[list[int]] = []
        # Per sequence, the rows of its path that no earlier sequence has.
        self._owned: list[list[int]] = []

        # (row of the prefix without its last token, that token) -> row of the prefix
        children: dict[tuple[int, int], int] = {}
        tokens: list[int] = []
        positions: list[int] = []

        for sequence in sequences:
            path: list[int] = []
            owned: list[int] = []

            for position, token in enumerate(sequence):
                edge = (path[-1] if path else -1, token)
                row = children.get(edge)
                if row is None:
                    row = children[edge] = len(tokens)
                    tokens.append(token)
                    positions.append(position)
                    owned.append(row)
                path.append(row)

            self.paths.append(path)
            self._owned.append(owned)

        self.n_rows = len(tokens)
        self.token_ids = torch.tensor(tokens, dtype=torch.int64, device=device)
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)

    def plan(self) -> AttentionPlan:
        """The attention plan in which every row attends to its prefixes and itself."""
        return plan_sequences(self._owned, self.paths, self.n_rows).to(self.positions.device)

    def last(self) -> Tensor:
        """The row of each sequence's last token, (n_sequences,) int64."""
        return torch.tensor([path[-1] for path in self.paths], device=self.positions.device)


@dataclass
class TreePass:
    """The rows of a tree after some layers of the model, so that a sweep can stop, change a weight and go on.

    rows: (n_rows, d_model), entering the next layer
    """

    tree: RowTree
    plan: AttentionPlan
    rotary: Rotary
    rows: Tensor

    @classmethod
    def start(cls, model: ModelAdapter, sequences: Sequence[Sequence[int]]) -> TreePass:
        """The rows of token sequences, entering layer 0."""
        tree = RowTree(sequences, model.device)
        rows = model.embed(tree.token_ids, tree.positions)

        return cls(tree, tree.plan(), model.rotary(tree.positions), rows)

    def subset(self, model: ModelAdapter, sequences: Sequence[Sequence[int]], sources: Sequence[int]) -> TreePass:
        """The pass for `sequences` alone; sequences[i] must be a prefix of the tree's sequence sources[i]."""
        tree = RowTree(sequences, model.device)
        index = torch.zeros(tree.n_rows, dtype=torch.int64)

        for path, source in zip(tree.paths, sources, strict=True):
            source_path = self.tree.paths[source][: len(path)]
            index[torch.tensor(path, dtype=torch.int64)] = torch.tensor(source_path, dtype=torch.int64)

        return TreePass(tree, tree.plan(), model.rotary(tree.positions), take(self.rows, index))

    def run(self, model: ModelAdapter, layers: range) -> TreePass:
        """The pass after `layers`."""
        return self.at(model.run(self.rows, layers, self.plan, self.rotary))

    def at(self, rows: Tensor) -> TreePass:
        """The same tree with other rows, of another point in the model."""
        return TreePass(self.tree, self.plan, self.rotary, rows)


class ValueSite(NamedTuple):
    """Where a change of the value enters a post-norm layer, per lookup token, (n_sequences, d_model) each.

    residual: the stream to which the layer adds; output: the down-projection's output, which is changed
    """

    residual: Tensor
    output: Tensor


@dataclass
class LiveRows:
    """Live rows of many sequences above one layer, with the constant keys and values before them.

    first: the lowest layer that runs; rows: (n_live, d_model), entering it; positions: (n_live,) int64 in the text
    lengths, prefix_lengths: per sequence, the number of its live rows and of the constant tokens before them
    scored_counts: per sequence, the number of its scored positions
    lookup: (n_sequences,) int64, live row of each lookup token
    scored: (n_scored,) int64, live rows whose next-token distribution is read, sequence by sequence
    site: where the change enters a post-norm model; None if it is added to `rows`, see `ModelAdapter.post_norm`
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
        """Add `change` (n_sequences, d_model) to the values at the lookup tokens and run all layers from `first` on.

        Returns what the head reads at the scored positions, (n_scored, d_head). Differentiable in `change`."""
        change = change.to(self.rows.device, self.rows.dtype)

        if self.site is None:
            rows = self.rows.index_add(0, self.lookup, change)
        else:
            changed = model.join(self.first - 1, self.site.residual, self.site.output + change)
            rows = self.rows.index_copy(0, self.lookup, changed)

        # Rounded to the dtype of the layers above only after the change is added.
        rows = rows.to(model.dtype)

        layers = range(self.first, model.n_layers)
        if not layers:
            return model.final_norm(take(rows, self.scored))

        return model.final_norm(model.run(rows, layers, self.plan, self.rotary, tail=self.scored))

    def select(self, model: ModelAdapter, keep: Sequence[int]) -> LiveRows:
        """The live rows of the sequences `keep` (ascending) alone."""
        starts = [0, *accumulate(self.lengths)]
        rows = torch.tensor([row for s in keep for row in range(starts[s], starts[s + 1])])

        first_scored = [0, *accumulate(self.scored_counts)]
        all_scored = self.scored.tolist()
        scored = [[row - starts[s] for row in all_scored[first_scored[s] : first_scored[s + 1]]] for s in keep]

        n_sequences = len(self.lengths)
        sequences = torch.tensor(list(keep))
        prefix = {
            layer: (_of_sequences(keys, n_sequences, sequences), _of_sequences(values, n_sequences, sequences))
            for layer, (keys, values) in self.plan.prefix.items()
        }

        return _assemble(
            model,
            first=self.first,
            rows=take(self.rows, rows),
            positions=take(self.positions, rows),
            lengths=[self.lengths[s] for s in keep],
            prefix_lengths=[self.prefix_lengths[s] for s in keep],
            scored=scored,
            prefix=prefix,
            prefix_width=max(self.prefix_lengths, default=0),
            site=None if self.site is None else ValueSite(*(take(part, sequences) for part in self.site)),
        )


def live_rows(
    model: ModelAdapter, sequences: Sequence[TokenSequence], layer: int, upper: ModelAdapter | None = None
) -> tuple[LiveRows, Tensor]:
    """Run once all that does not depend on the value of `layer` at the lookup token.

    upper: the adapter that runs the layers above, see `ModelAdapter.upper_copy`; None = `model`
    Returns the live rows above `layer`, and the present value at each lookup token, (n_sequences, d_model): the
    hidden state after the layer, or the down-projection's output if the model is post-norm."""
    upper = upper or model

    below = TreePass.start(model, [sequence.ids for sequence in sequences]).run(model, range(layer))
    mixed = model.mix(layer, below.rows, below.plan, below.rotary)
    output = model.ffn_output(layer, mixed.ffn_input)
    above = below.at(model.join(layer, mixed.residual, output))
    paths = above.tree.paths

    at_lookup = torch.tensor([path[sequence.lookup] for path, sequence in zip(paths, sequences, strict=True)])
    site = ValueSite(take(mixed.residual, at_lookup), take(output, at_lookup)) if model.post_norm else None
    value = take(above.rows, at_lookup) if site is None else site.output

    prefix_tokens = [sequence.ids[: sequence.lookup] for sequence in sequences]
    with_prefix = [s for s, tokens in enumerate(prefix_tokens) if tokens]
    prefix: dict[int, tuple[Tensor, Tensor]] = {}
    if with_prefix and layer + 1 < model.n_layers:
        constant = above.subset(upper, [prefix_tokens[s] for s in with_prefix], with_prefix)
        constant = constant.at(constant.rows.to(upper.dtype))
        prefix = prefix_states(upper, constant, layer + 1, len(sequences), with_prefix)

    live_paths = [path[sequence.lookup :] for path, sequence in zip(paths, sequences, strict=True)]
    index = torch.tensor([row for path in live_paths for row in path])
    live = _assemble(
        upper,
        first=layer + 1,
        rows=take(above.rows, index),
        positions=take(above.tree.positions, index),
        lengths=[len(path) for path in live_paths],
        prefix_lengths=[len(tokens) for tokens in prefix_tokens],
        scored=[[position - sequence.lookup for position in sequence.scored] for sequence in sequences],
        prefix=prefix,
        prefix_width=max(len(tokens) for tokens in prefix_tokens),
        site=site,
    )

    return live, value.to(model.device)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], on the device of the rows."""
    return rows[index.to(rows.device)]


def _of_sequences(states: Tensor, n_sequences: int, sequences: Tensor) -> Tensor:
    """Keys or values of some sequences, from those of all: (n_kv_heads * n_sequences, length, head_dim), head-major."""
    by_head = states.view(-1, n_sequences, *states.shape[1:])

    return by_head[:, sequences.to(states.device)].flatten(0, 1)


def prefix_states(
    model: ModelAdapter, constant: TreePass, first: int, n_sequences: int, with_prefix: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of the constant rows at every layer from `first` on, as `AttentionPlan.prefix` has them.

    constant: pass of the prefixes, entering layer `first`
    with_prefix: the sequences, of n_sequences, to which its paths belong; the others get padding alone"""
    width = max(len(path) for path in constant.tree.paths)
    index = torch.zeros(n_sequences, width, dtype=torch.int64)
    for s, path in zip(with_prefix, constant.tree.paths, strict=True):
        index[s, : len(path)] = torch.tensor(path)
    flat = index.flatten()

    prefix: dict[int, tuple[Tensor, Tensor]] = {}
    collected: dict[int, tuple[Tensor, Tensor]] = {}
    rows = constant.rows
    plan = constant.plan.collecting(collected)

    for layer in range(first, model.n_layers):
        mixed = model.mix(layer, rows, plan, constant.rotary)
        if layer + 1 < model.n_layers:
            rows = model.feed_forward(layer, mixed)

        key, value = collected.pop(layer)
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
    """Live rows with their plan.

    scored: per sequence, its scored positions, counted from the lookup token
    prefix_width: length to which the prefix is padded"""
    width = max(prefix_lengths)
    # Selected sequences may not include the one with the longest prefix; padding beyond the longest is cut.
    if width == 0:
        prefix = {}
    elif width < prefix_width:
        prefix = {
            layer: (keys[:, :width].contiguous(), values[:, :width].contiguous())
            for layer, (keys, values) in prefix.items()
        }
    plan = plan_live(lengths, prefix_lengths, prefix).to(rows.device)

    starts = [0, *accumulate(lengths)][:-1]
    scored_rows = [start + position for start, local in zip(starts, scored, strict=True) for position in local]

    return LiveRows(
        first=first,
        rows=rows,
        positions=positions,
        lengths=lengths,
        prefix_lengths=prefix_lengths,
        scored_counts=[len(local) for local in scored],
        lookup=torch.tensor(starts, device=rows.device),
        scored=torch.tensor(scored_rows, device=model.layer_device(model.n_layers - 1)),
        plan=plan,
        rotary=model.rotary(positions),
        site=site,
    )
