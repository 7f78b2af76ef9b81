"""FiNE's choice of neurons: contribution scores, ranked over all layers for every target token.

At the position whose logits predict target token y_j, with the beginning of the target given,
    c_j(l, i) = a_l[j, i] * <W_l[:, i], E[t_j]>        t_j the token scored, E the unembedding
(FiNE, ICLR 2025, arXiv 2503.01090). The k pairs (l, i) with the largest c_j are chosen. Scores are signed; they contain
no norm, bias or softmax; one ranking covers all layers but the last few. The slots of an edit are those of its target
tokens one after the other, and a neuron that is chosen for two tokens has two slots.

Where a norm stands behind the down-projection (Gemma 3), what a neuron writes is multiplied by the norm's gain over its
scale, a factor that differs a thousandfold between layers. E[t_j] is multiplied by it first, which the paper, without
such a model, has no need of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastedit.model.adapter import ModelAdapter
from fastedit.model.logits import LogitBuffer
from fastedit.model.packed_passes import TreePass, ValueSite, group_by_budget, take
from fastedit.model.post_norm import PostNorm
from fastedit.model.tokens import TokenSequence, target_sequences
from fastedit.ops.capture_keys import activate
from fastedit.ops.score_neurons import score_neurons
from fastedit.records.edit import Edit


@dataclass(frozen=True)
class Slots:
    """Columns chosen for edits, all tensors (n_slots,) on the CPU, sorted by edit.

    edits: int64, the edit's position in its batch
    layers, neurons: int64
    scores: floating point, the score of the neuron
    scales: floating point, factor of what is added to the column; None = 1
    """

    edits: Tensor
    layers: Tensor
    neurons: Tensor
    scores: Tensor
    scales: Tensor | None = None

    def __len__(self) -> int:
        return len(self.edits)

    @classmethod
    def joined(cls, parts: Sequence[Slots]) -> Slots:
        """The slots of all parts, one part after the other. All parts have scales, or none has."""
        scales = [part.scales for part in parts if part.scales is not None]
        return cls(
            torch.cat([part.edits for part in parts]),
            torch.cat([part.layers for part in parts]),
            torch.cat([part.neurons for part in parts]),
            torch.cat([part.scores for part in parts]),
            torch.cat(scales) if scales else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without scales where they are None."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def pick(self, index: Tensor) -> Slots:
        """The slots at `index`, int64 or bool."""
        scales = None if self.scales is None else self.scales[index]
        return Slots(self.edits[index], self.layers[index], self.neurons[index], self.scores[index], scales)


@dataclass(frozen=True)
class Observation:
    """What a pass reads at the scored positions of sequences, one row per position.

    activations: layer -> (n_scored, d_ff) in the model's dtype, on the layer's device
    factors: layer -> (n_scored, d_model) float32 on `ModelAdapter.device`, see `PostNorm.factor`; empty without a norm
        behind the down-projection
    greedy: (n_scored,) int64, the token that the model ranks first, on `ModelAdapter.device`
    """

    activations: dict[int, Tensor]
    factors: dict[int, Tensor]
    greedy: Tensor

    def through_norm(self, layer: int, rows: Tensor) -> Tensor:
        """rows (n_scored, d_model) times the factors of the layer; the rows themselves where it has none."""
        return rows * self.factors[layer].to(rows.device) if layer in self.factors else rows


def observe(
    model: ModelAdapter, sequences: Sequence[TokenSequence], layers: Sequence[int], gate_only: bool = False
) -> Observation:
    """Activations of `layers` and greedy tokens at the scored positions, by one pass without gradient.

    Sequences that begin alike share rows. Use inside `model.packed()`.

    gate_only: read the activation function's output instead of the down-projection's input; the two differ where there
        is an up projection"""
    run = TreePass.start(model, [s.ids for s in sequences])
    scored = torch.tensor([path[p] for path, s in zip(run.tree.paths, sequences, strict=True) for p in s.scored])

    activations: dict[int, Tensor] = {}
    factors: dict[int, Tensor] = {}
    wanted = set(layers)
    for layer in range(model.n_layers):
        mixed = model.mix(layer, run.rows, run.plan, run.rotary)
        rows, keys = model.feed_forward_with_keys(layer, mixed)
        if layer in wanted and gate_only:
            gate, _ = model.gate_up(layer, take(mixed.ffn_input, scored))
            activations[layer] = activate(gate, model.activation_name)
        elif layer in wanted:
            activations[layer] = take(keys, scored)
        if layer in wanted and model.post_norm:
            factors[layer] = _factor(model, layer, take(mixed.residual, scored), take(keys, scored))
        run = run.at(rows)

    final = model.final_norm(take(run.rows, scored))
    buffer = LogitBuffer(torch.promote_types(model.dtype, torch.float32))
    greedy = buffer.logits(final, model.head).argmax(1).to(model.device)
    return Observation(activations, factors, greedy)


def _factor(model: ModelAdapter, layer: int, residual: Tensor, keys: Tensor) -> Tensor:
    """`PostNorm.factor` at rows of a layer, (n_rows, d_model) float32."""
    site = ValueSite(*(part.float().to(model.device) for part in (residual, model.down(layer, keys))))
    return PostNorm.of(model, layer).factor(site)


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
    """The k neurons of `layers` with the largest contribution at every scored position. Use inside `model.packed()`.

    gate_only: as for `observe`
    tokens: per sequence the token scored at its first scored position, in place of the greedy one; None or () = greedy
    token_budget: tokens run in one pass
    excluded: (n_layers, d_ff) bool, neurons whose score is set to 0; None = none
    The slots of a position are sorted by descending score; among equal scores the lowest layer comes first, then the
    lowest neuron."""
    groups = group_by_budget([len(sequence.ids) for sequence in sequences], token_budget)
    observations = [observe(model, [sequences[i] for i in group], layers, gate_only) for group in groups]
    counts = torch.tensor([len(s.scored) for s in sequences])
    greedy = torch.cat([observation.greedy for observation in observations])
    directions = model.unembedding(_scored_tokens(greedy, counts, tokens))

    scores: list[Tensor] = []
    neurons: list[Tensor] = []
    for layer in layers:
        weight = model.output_weight(layer)
        keys = torch.cat([observation.activations[layer] for observation in observations])
        if excluded is not None:
            keys = keys.masked_fill(excluded[layer].to(keys.device), 0)
        parts = torch.split(directions, [len(observation.greedy) for observation in observations])
        read = torch.cat([seen.through_norm(layer, part) for seen, part in zip(observations, parts, strict=True)])
        best = score_neurons(keys, weight, read.to(weight.device, weight.dtype), min(k, model.d_ff))
        scores.append(best.values.to(model.device))
        neurons.append(best.neurons.to(model.device) + layer * model.d_ff)

    # The stable sort keeps the order of layers and neurons among equal scores.
    order = torch.cat(scores, 1).argsort(dim=1, descending=True, stable=True)[:, :k]
    chosen = torch.cat(neurons, 1).gather(1, order).flatten().cpu()
    chosen_scores = torch.cat(scores, 1).gather(1, order).flatten().cpu()
    edits = torch.arange(len(sequences)).repeat_interleave(counts * order.shape[1])
    return Slots(edits, chosen // model.d_ff, chosen % model.d_ff, chosen_scores)


def common_neurons(
    model: ModelAdapter,
    windows: Sequence[Sequence[int]],
    k: int,
    layers: Sequence[int],
    share: float,
    gate_only: bool = False,
) -> Tensor:
    """Neurons that would be chosen at more than `share` of all positions of background text, (n_layers, d_ff) bool.

    windows: token ids of texts; the other arguments as for `choose_slots`. Use inside `model.packed()`.

    A neuron that pushes " the" wherever an article is due is not specific to a fact, and changing it changes every
    text."""
    texts = [TokenSequence(tuple(window), -1, tuple(range(len(window)))) for window in windows if window]
    slots = choose_slots(model, texts, k, layers, gate_only)

    counts = torch.bincount(slots.layers * model.d_ff + slots.neurons, minlength=model.n_layers * model.d_ff)
    n_positions = sum(len(text.scored) for text in texts)
    return (counts > share * n_positions).view(model.n_layers, model.d_ff)


def old_tokens(tokenizer: Any, edits: Sequence[Edit]) -> list[int | None]:
    """The first token of each edit's `target_true` after its prompt; None where the record has no `target_true`."""
    answered = [edit for edit in edits if edit.target_true is not None]
    answers = [edit.target_true for edit in answered if edit.target_true is not None]
    joins = [edit.join for edit in answered]
    sequences = iter(target_sequences(tokenizer, [edit.prompt for edit in answered], answers, joins))
    return [None if edit.target_true is None else next(sequences).targets[0] for edit in edits]


def _scored_tokens(greedy: Tensor, counts: Tensor, tokens: Sequence[int | None]) -> Tensor:
    """The token scored at every position, (n_scored,) int64: the greedy one, or at a first position that of `tokens`.

    counts: (n_sequences,) int64, scored positions of each sequence"""
    scored = greedy.clone()
    first = counts.cumsum(0) - counts
    for position, token in zip(first.tolist(), tokens, strict=False):
        if token is not None:
            scored[position] = token
    return scored
