"""The neurons that FiNE would write for one edit: a table, plain data, and a heat map over the layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit.methods.columns.contributions import Observation, choose_slots, observe
from fastedit.model.adapter import ModelAdapter
from fastedit.model.tokens import TokenSequence, whole_sequences
from fastedit.ops.score_neurons import score_neurons


@dataclass(frozen=True)
class Neuron:
    """One chosen neuron.

    target: the target token at whose position it was chosen; said: the token that the model says there now
    score: what the neuron adds to that token's logit, before the final norm
    promotes: the tokens to whose logits it adds most there, the first one most
    """

    target: str
    said: str
    layer: int
    neuron: int
    score: float
    promotes: tuple[str, ...]


@dataclass(frozen=True)
class Located:
    """neurons: those chosen, target token by target token; largest: (n_layers, n_target_tokens), the largest
    contribution of any neuron of a layer; n_candidates: layers from which neurons are chosen, the lowest ones."""

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
        width = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(size) for cell, size in zip(row, width, strict=True)).rstrip() for row in (head, *rows)
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
) -> Located:
    """Locate the k neurons per target token of the edit prompt -> target in all layers but the last `frozen_layers`.

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
        largest = [
            score_neurons(keys, model.down_weight(layer), directions.to(keys.device, keys.dtype), 1).values.cpu()
            for layer, keys in observed.activations.items()
        ]
        neurons = _describe(model, sequences[0], observed, slots.layers, slots.neurons, slots.scores, n_promoted)
    return Located(prompt, neurons, torch.cat(largest, 1).T.float(), n_candidates)


def _describe(
    model: ModelAdapter,
    sequence: TokenSequence,
    observed: Observation,
    layers: Tensor,
    neurons: Tensor,
    scores: Tensor,
    n_promoted: int,
) -> tuple[Neuron, ...]:
    def name(token: int) -> str:
        return repr(model.tokenizer.decode([token]))

    per_token = len(layers) // len(sequence.targets)
    found = []
    for slot, (layer, neuron) in enumerate(zip(layers.tolist(), neurons.tolist(), strict=True)):
        token = slot // per_token
        pushed = observed.activations[layer][token, neuron] * model.down_weight(layer)[:, neuron]
        every = torch.arange(model.head.weight.shape[0])
        logits = model.unembedding(every) @ pushed.to(model.device)
        promoted = logits.topk(min(n_promoted, len(every))).indices.tolist()
        said = name(int(observed.greedy[token]))
        promotes = tuple(name(t) for t in promoted)
        found.append(Neuron(name(sequence.targets[token]), said, layer, neuron, float(scores[slot]), promotes))
    return tuple(found)
