"""A report of the neurons that FiNE would write for one edit: a table, plain data, a heat map over the layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit.methods.columns.contributions import Observation, Slots, choose_slots, observe
from fastedit.model.adapter import ModelAdapter
from fastedit.model.tokens import TokenSequence, whole_sequences
from fastedit.ops.score_neurons import score_neurons


@dataclass(frozen=True)
class Neuron:
    """One chosen neuron.

    target: the target token at whose position it was chosen
    said: the token that the model ranks first there now
    score: what the neuron adds to the logit of `said`, before the final norm
    promotes: the tokens whose logits it raises most there, in descending order
    """

    target: str
    said: str
    layer: int
    neuron: int
    score: float
    promotes: tuple[str, ...]


@dataclass(frozen=True)
class NeuronReport:
    """The neurons chosen for one edit.

    neurons: target token by target token, each by descending score
    largest: (n_layers, n_target_tokens) float32, the largest contribution of any neuron of a layer
    n_candidates: number of layers from which neurons are chosen, counted from the lowest
    """

    prompt: str
    neurons: tuple[Neuron, ...]
    largest: Tensor
    n_candidates: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "prompt": self.prompt,
            "neurons": [asdict(neuron) for neuron in self.neurons],
            "largest_by_layer": self.largest.tolist(),
            "candidate_layers": self.n_candidates,
        }

    def __str__(self) -> str:
        head = ("target", "said now", "layer", "neuron", "score", "promotes")
        rows = [
            (n.target, n.said, str(n.layer), str(n.neuron), f"{n.score:.3f}", " ".join(n.promotes))
            for n in self.neurons
        ]
        widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        )

    def plot(self, path: Path) -> None:
        """Draw `largest` as a PNG, layers from bottom to top. Raises ValueError where matplotlib is not installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ValueError("a plot needs matplotlib: pip install 'fastedit-engine[plot]'") from error

        targets = list(dict.fromkeys((n.target, n.said) for n in self.neurons))
        n_layers, n_tokens = self.largest.shape
        figure = Figure(figsize=(2.5 + 0.9 * n_tokens, 1.5 + 0.2 * n_layers), layout="constrained")

        axes = figure.add_subplot()
        image = axes.imshow(self.largest.numpy(), origin="lower", aspect="auto", cmap="viridis")
        axes.axhline(self.n_candidates - 0.5, color="white", linestyle="--")
        if len(targets) == n_tokens:
            axes.set_xticks(range(n_tokens), [f"{target} (now {said})" for target, said in targets], rotation=30)
        axes.set_ylabel("layer")
        axes.set_title(self.prompt, fontsize=8)

        figure.colorbar(image, label="largest contribution of a neuron")
        figure.savefig(path, format="png", dpi=120)


def locate_neurons(
    model: ModelAdapter, prompt: str, target: str, k: int = 5, frozen_layers: int = 3, n_promoted: int = 5
) -> NeuronReport:
    """The k neurons per target token that FiNE chooses for the edit prompt -> target.

    frozen_layers: the last layers, in which no neuron is chosen
    n_promoted: number of promoted tokens reported for each neuron
    Raises ValueError for a blank prompt or target and when no layer is left."""
    for name, text in (("prompt", prompt), ("target", target)):
        if not text.strip():
            raise ValueError(f"{name} must not be blank, got {text!r}")
    if not 0 <= frozen_layers < model.n_layers:
        raise ValueError(f"frozen_layers must be in [0, {model.n_layers}), got {frozen_layers}")

    sequences = whole_sequences(model.tokenizer, [prompt], [target])
    n_candidates = model.n_layers - frozen_layers
    with torch.no_grad(), model.packed():
        observed = observe(model, sequences, range(model.n_layers))
        slots = choose_slots(model, sequences, k, range(n_candidates))
        directions = model.unembedding(observed.greedy)
        largest = []
        for layer, keys in observed.activations.items():
            read = observed.through_norm(layer, directions).to(keys.device, keys.dtype)
            largest.append(score_neurons(keys, model.output_weight(layer), read, 1).values.cpu())
        neurons = _describe(model, sequences[0], observed, slots, n_promoted)
    return NeuronReport(prompt, neurons, torch.cat(largest, 1).T.float(), n_candidates)


def _describe(
    model: ModelAdapter, sequence: TokenSequence, observed: Observation, slots: Slots, n_promoted: int
) -> tuple[Neuron, ...]:
    """The slots of one sequence in words. observed: all layers at its scored positions"""
    decode = model.tokenizer.decode
    unembedding = model.unembedding(torch.arange(model.head.weight.shape[0]))
    per_token = len(slots) // len(sequence.targets)

    neurons: list[Neuron] = []
    for number, (layer, neuron) in enumerate(zip(slots.layers.tolist(), slots.neurons.tolist(), strict=True)):
        place = number // per_token
        added = observed.activations[layer][place, neuron] * model.output_weight(layer)[:, neuron]
        rows = added.to(model.device).expand(len(observed.greedy), -1)
        logits = unembedding @ observed.through_norm(layer, rows)[place]
        promoted = logits.topk(min(n_promoted, len(logits))).indices.tolist()
        neurons.append(
            Neuron(
                target=repr(decode([sequence.targets[place]])),
                said=repr(decode([int(observed.greedy[place])])),
                layer=layer,
                neuron=neuron,
                score=float(slots.scores[number]),
                promotes=tuple(repr(decode([token])) for token in promoted),
            )
        )
    return tuple(neurons)
