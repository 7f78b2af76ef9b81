"""Which neurons to edit: FiNE's contribution scores, ranked over all layers for every target token.

At the position whose logits predict target token y_j, with the model as it is and the beginning of the target given,
    c_j(l, i) = a_l[j, i] * <W_l[:, i], E[t_j]>        t_j the token scored, E the unembedding
and the k pairs (l, i) with the largest c_j are chosen: signed, no norm, bias or softmax, one ranking over all layers
but the last few. The chosen neurons of an edit are those of its target tokens one after the other; one that is chosen
for two tokens is there twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastedit.model.adapter import ModelAdapter
from fastedit.model.logits import LogitBuffer
from fastedit.model.packed_passes import TreePass, take
from fastedit.model.tokens import TokenSequence, target_sequences
from fastedit.ops.capture_keys import activate
from fastedit.ops.score_neurons import score_neurons
from fastedit.records.edit import Edit


@dataclass(frozen=True)
class Slots:
    """Columns chosen for edits, (n_slots,) each on the CPU: edit (its position in the batch), layer and neuron int64,
    score float; sorted by edit, then by target token, then by descending score. scales: factor of what is added to
    each column, or None for 1."""

    edits: Tensor
    layers: Tensor
    neurons: Tensor
    scores: Tensor
    scales: Tensor | None = None

    def __len__(self) -> int:
        return len(self.edits)

    @classmethod
    def joined(cls, parts: Sequence[Slots]) -> Slots:
        """The slots of all parts, one behind the other; all with scales, or none."""
        columns: list[list[Any]] = [[getattr(part, field.name) for part in parts] for field in fields(cls)]
        joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
        return cls(*joined)

    def tensors(self) -> dict[str, Tensor]:
        """The columns by name, scales only where there are some."""
        return {name: column for name, column in vars(self).items() if column is not None}

    def pick(self, index: Tensor) -> Slots:
        """The slots at `index`, int64 or bool."""
        scales = None if self.scales is None else self.scales[index]
        return Slots(self.edits[index], self.layers[index], self.neurons[index], self.scores[index], scales)


@dataclass(frozen=True)
class Observation:
    """The model's state at the scored positions of sequences, one row each.

    activations: layer -> (n_scored, d_ff); greedy: (n_scored,) int64, the model's own next token
    """

    activations: dict[int, Tensor]
    greedy: Tensor


def observe(
    model: ModelAdapter, sequences: Sequence[TokenSequence], layers: Sequence[int], gate_only: bool = False
) -> Observation:
    """One pass without gradient; sequences that begin alike share rows. Use inside `model.packed()`.

    gate_only: the activation without the up projection, where there is one"""
    run = TreePass.start(model, [s.ids for s in sequences])
    scored = torch.tensor([path[p] for path, s in zip(run.tree.paths, sequences, strict=True) for p in s.scored])
    activations: dict[int, Tensor] = {}
    wanted = set(layers)
    for layer in range(model.n_layers):
        mixed = model.mix(layer, run.rows, run.plan, run.rotary)
        rows, keys = model.feed_forward_with_keys(layer, mixed)
        if layer in wanted:
            if gate_only:
                gate, _ = model.gate_up(layer, take(mixed.ffn_input, scored))
                activations[layer] = activate(gate, model.activation_name)
            else:
                activations[layer] = take(keys, scored)
        run = run.at(rows)
    final = model.final_norm(take(run.rows, scored))
    return Observation(
        activations,
        LogitBuffer(torch.promote_types(model.dtype, torch.float32))
        .logits(final, model.head)
        .argmax(1)
        .to(model.device),
    )


def choose_slots(
    model: ModelAdapter,
    sequences: Sequence[TokenSequence],
    k: int,
    layers: Sequence[int],
    gate_only: bool = False,
    tokens: Sequence[int | None] = (),
    token_budget: int = 4096,
    excluded: Tensor | None = None,
) -> Slots:
    """The k neurons of `layers` with the largest contribution for every scored position. Use inside `model.packed()`.

    tokens: per sequence, the token scored at its first position in place of the model's own; None or () = its own
    token_budget: tokens looked at in one pass
    excluded: (n_layers, d_ff) bool, neurons that score 0; None = none
    """
    parts = [observe(model, group, layers, gate_only) for group in _groups(sequences, token_budget)]
    best = torch.cat([part.greedy for part in parts])
    counts = torch.tensor([len(s.scored) for s in sequences])
    first = counts.cumsum(0) - counts
    for place, token in zip(first.tolist(), tokens, strict=False):
        if token is not None:
            best[place] = token
    directions = model.unembedding(best)
    values, flat = [], []
    for layer in layers:
        weight = model.down_weight(layer)
        keys = torch.cat([part.activations[layer] for part in parts])
        if excluded is not None:
            keys = keys.masked_fill(excluded[layer].to(keys.device), 0)
        found = score_neurons(keys, weight, directions.to(weight.device, weight.dtype), min(k, model.d_ff))
        values.append(found.values.to(model.device))
        flat.append(found.neurons.to(model.device) + layer * model.d_ff)
    # Stable: among equal scores the lowest layer, then the lowest neuron, comes first.
    order = torch.cat(values, 1).argsort(dim=1, descending=True, stable=True)[:, :k]
    chosen = torch.cat(flat, 1).gather(1, order).flatten().cpu()
    scores = torch.cat(values, 1).gather(1, order).flatten().cpu()
    edits = torch.arange(len(sequences)).repeat_interleave(counts * order.shape[1])
    return Slots(edits, chosen // model.d_ff, chosen % model.d_ff, scores)


def common_neurons(
    model: ModelAdapter,
    windows: Sequence[Sequence[int]],
    k: int,
    layers: Sequence[int],
    share: float,
    gate_only: bool = False,
) -> Tensor:
    """Neurons that would be chosen for more than `share` of all positions of background text, (n_layers, d_ff) bool.

    windows: token ids of texts; the other arguments as for `choose_slots`. Use inside `model.packed()`.
    What pushes " the" wherever an article is due says nothing about a fact; changing it changes every text."""
    texts = [TokenSequence(tuple(window), -1, tuple(range(len(window)))) for window in windows if window]
    slots = choose_slots(model, texts, k, layers, gate_only)
    counts = torch.bincount(slots.layers * model.d_ff + slots.neurons, minlength=model.n_layers * model.d_ff)
    n_positions = sum(len(text.scored) for text in texts)
    return (counts > share * n_positions).view(model.n_layers, model.d_ff)


def old_tokens(tokenizer: Any, edits: Sequence[Edit]) -> list[int | None]:
    """The first token of each edit's `target_true` behind its prompt; None where the record has none."""
    known = [edit for edit in edits if edit.target_true is not None]
    answers = [edit.target_true or "" for edit in known]
    found = iter(target_sequences(tokenizer, [edit.prompt for edit in known], answers))
    return [None if edit.target_true is None else next(found).targets[0] for edit in edits]


def _groups(sequences: Sequence[TokenSequence], token_budget: int) -> list[list[TokenSequence]]:
    """The sequences in order, cut into groups of at most token_budget tokens (or one sequence)."""
    groups: list[list[TokenSequence]] = []
    used = 0
    for sequence in sequences:
        if not groups or used + len(sequence.ids) > token_budget:
            groups.append([])
            used = 0
        groups[-1].append(sequence)
        used += len(sequence.ids)
    return groups
