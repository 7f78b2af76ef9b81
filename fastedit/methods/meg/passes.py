"""Passes with one neuron per sequence, which run everything below the neuron's layer once.

Layers below never see the neuron, and the text is fixed, so input (z) and output of the neuron's feed-forward are
computed once. After that only the layers above run, and logits are computed at the scored positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fastedit.evaluation.answers import LOGIT_ROWS
from fastedit.model.adapter import ModelAdapter
from fastedit.model.logits import LogitBuffer, score_rows
from fastedit.model.packed_attention import plan_live
from fastedit.model.packed_passes import TreePass, group_by_budget, take
from fastedit.model.tokens import TokenSequence


class UpperRows:
    """Rows of whole sequences at one layer, which can be run through the layers above any number of times.

    inputs, output: (n_rows, d_model) input z and output of the feed-forward
    residual: (n_rows, d_model) the residual stream that the output is added to
    owner: (n_rows,) int64, the sequence of each row
    scored: (n_scored,) int64, rows whose next-token distribution is read, sequence by sequence
    Use inside `model.packed()`.
    """

    def __init__(
        self, layer: int, inputs: Tensor, residual: Tensor, output: Tensor, sequences: Sequence[TokenSequence]
    ) -> None:
        self.layer = layer
        self.inputs, self.residual, self.output = inputs, residual, output
        self.sequences = list(sequences)

        lengths = [len(sequence.ids) for sequence in sequences]
        starts = [0, *accumulate(lengths)]
        device = inputs.device
        self.owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
        self.positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        scored = [start + place for start, s in zip(starts, sequences, strict=False) for place in s.scored]
        self.scored = torch.tensor(scored, device=device)
        self.plan = plan_live(lengths, [0] * len(lengths)).to(device)

    @classmethod
    def start(cls, model: ModelAdapter, sequences: Sequence[TokenSequence], layer: int) -> UpperRows:
        """Run everything up to the feed-forward of `layer`. Sequences with a common beginning share that work."""
        with torch.no_grad():
            below = TreePass.start(model, [sequence.ids for sequence in sequences]).run(model, range(layer))
            mixed = model.mix(layer, below.rows, below.plan, below.rotary)
            output = model.ffn_output(layer, mixed.ffn_input)
        index = torch.tensor([row for path in below.tree.paths for row in path])
        return cls(layer, take(mixed.ffn_input, index), take(mixed.residual, index), take(output, index), sequences)

    def run(self, model: ModelAdapter, added: Tensor | None) -> Tensor:
        """The input of the head at the scored positions, (n_scored, d_head); differentiable in `added`.

        added: (n_rows, d_model), added to the output of the feed-forward; None = the base model"""
        output = self.output if added is None else (self.output.to(added.dtype) + added).to(self.output.dtype)
        rows = model.join(self.layer, self.residual, output)

        layers = range(self.layer + 1, model.n_layers)
        if not layers:
            return model.final_norm(take(rows, self.scored))
        rotary = model.rotary(self.positions)
        return model.final_norm(model.run(rows, layers, self.plan, rotary, tail=self.scored))

    def select(self, keep: Sequence[int]) -> UpperRows:
        """The same for only the sequences `keep`, ascending indices."""
        wanted = torch.zeros(len(self.sequences), dtype=torch.bool, device=self.owner.device)
        wanted[list(keep)] = True
        rows = wanted[self.owner]
        parts = (self.inputs[rows], self.residual[rows], self.output[rows])
        return UpperRows(self.layer, *parts, [self.sequences[s] for s in keep])


def group_by_rows(sequences: Sequence[TokenSequence], budget: int) -> list[list[int]]:
    """Indices of sequences in groups of similar length, each of at most `budget` rows, padding of the attention core
    included (or one sequence)."""
    sizes = [len(sequence.ids) for sequence in sequences]
    order = sorted(range(len(sequences)), key=lambda i: (sizes[i], i))
    return group_by_budget(sizes, budget, order, padded=True)


@torch.no_grad()
def best_tokens(
    model: ModelAdapter, rows: UpperRows, added: Tensor | None, buffer: LogitBuffer
) -> list[tuple[int, ...]]:
    """The arg-max tokens at each sequence's scored positions. added: as in `UpperRows.run`"""
    tokens: list[int] = []
    for part in torch.split(rows.run(model, added), LOGIT_ROWS):
        nothing = torch.zeros(len(part), dtype=torch.int64, device=part.device)
        tokens += score_rows(part, model.head, nothing, buffer).best.tolist()

    best, start = [], 0
    for sequence in rows.sequences:
        best.append(tuple(tokens[start : start + len(sequence.scored)]))
        start += len(sequence.scored)
    return best
