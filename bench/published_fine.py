"""The published FiNE procedure, one edit at a time, as the yardstick for speed and exactness.

Fine-grained neuron-level editing (FiNE, arXiv 2503.01090) in plain torch, with all the work of its description: one
forward of prompt and target locates the neurons, with one scan of every down-projection per target token; every step
runs the whole model on the whole text, computes the losses from all its logits and differentiates through all of it. It
shares no code with fastedit.

For a prompt of P tokens and a target y_0 .. y_{S-1}, with a_l the input of the down-projection W_l and E the head:

    chosen     for every j the k largest a_l[P-1+j, i] <W_l[:, i], E[t_j]> over (l, i), t_j the model's greedy token
    edit       max_j -log p(y_j)
    drift      kl * mean_{p <= P-2} KL(p_0 || p)
    repetition repeat * max_j -log(1 - p(y_j)) at the last token
    norm       size * ||D||_F

One choice of the released code is not followed: D and Adam are in the model's dtype, or float32, not bf16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FineSettings:
    """Constants of one run.

    k: neurons per target token; frozen: the last layers, in which none is chosen
    lr, steps: Adam's learning rate and the largest number of its steps
    kl, repeat, size: weights of drift, repetition and norm
    stop: training ends when every target token is more probable than this
    gate_only: score the activation alone, without the up projection
    """

    k: int = 5
    frozen: int = 3
    lr: float = 1e-3
    steps: int = 50
    kl: float = 1.0
    repeat: float = 10.0
    size: float = 0.1
    stop: float = 0.9
    gate_only: bool = False


@dataclass
class FineResult:
    """One located and trained edit.

    slots: (layer, neuron) in the order of choice; scores: (n_slots,)
    delta: (n_slots, d_model), the vectors
    losses: (total, edit loss) of every forward; steps: Adam steps
    """

    slots: list[tuple[int, int]]
    scores: Tensor
    delta: Tensor
    losses: list[tuple[float, float]] = field(default_factory=list)
    steps: int = 0


def weight_of(down: Any) -> Tensor:
    """W, (d_model, d_ff); GPT-2 stores the transposed matrix."""
    return down.weight.T if type(down).__name__ == "Conv1D" else down.weight


@contextmanager
def hooked(modules: Sequence[nn.Module], hook: Any) -> Iterator[None]:
    """Call `hook(number, inputs, output)` after each module's forward; a returned tensor replaces the output."""
    handles = [
        module.register_forward_hook(lambda _, inputs, output, number=number: hook(number, inputs, output))
        for number, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def locate(
    model: Any,
    downs: Sequence[Any],
    prompt: Sequence[int],
    target: Sequence[int],
    settings: FineSettings,
    gates: Sequence[Any] = (),
) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
    """Chosen (layer, neuron) in order, their scores (n_slots,), and the unedited logits (P + S, n_vocabulary).

    gates: the modules whose output is the activation alone, for gate_only"""
    activations: dict[int, Tensor] = {}
    if settings.gate_only:
        with hooked(gates, lambda number, inputs, output: activations.__setitem__(number, output[0])):
            logits = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0]
    else:
        with hooked(downs, lambda number, inputs, output: activations.__setitem__(number, inputs[0][0])):
            logits = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0]

    head = model.get_output_embeddings().weight
    chosen: list[tuple[int, int]] = []
    scores: list[Tensor] = []
    for j in range(len(target)):
        position = len(prompt) - 1 + j
        direction = head[logits[position].argmax()]
        rows = [
            activations[layer][position] * (direction @ weight_of(downs[layer]))
            for layer in range(len(downs) - settings.frozen)
        ]

        contribution = torch.stack(rows)
        values, index = contribution.flatten().topk(settings.k)
        width = contribution.shape[1]
        chosen += [(int(i) // width, int(i) % width) for i in index]
        scores.append(values)
    return chosen, torch.cat(scores), logits


def edit_one(
    model: Any,
    downs: Sequence[Any],
    prompt: Sequence[int],
    target: Sequence[int],
    settings: FineSettings,
    gates: Sequence[Any] = (),
) -> FineResult:
    """Locate and train one edit; no weight is changed."""
    slots, scores, before = locate(model, downs, prompt, target, settings, gates)
    wide = before.dtype if before.dtype == torch.float64 else torch.float32
    delta = torch.zeros(len(slots), weight_of(downs[0]).shape[0], dtype=wide, requires_grad=True)
    result = FineResult(slots, scores, delta)
    adam = torch.optim.Adam([delta], lr=settings.lr)
    places = {layer: [r for r, slot in enumerate(slots) if slot[0] == layer] for layer, _ in slots}

    def change(layer: int, inputs: Any, output: Tensor) -> Tensor | None:
        if layer not in places:
            return None
        neurons = [slots[r][1] for r in places[layer]]
        return output + (inputs[0][..., neurons].to(wide) @ delta[places[layer]]).to(output.dtype)

    ids = torch.tensor([[*prompt, *target]])
    reference = before[: len(prompt) - 1].to(wide).log_softmax(-1)
    with torch.enable_grad(), hooked(downs, change):
        for _ in range(settings.steps):
            logits = model(input_ids=ids).logits[0].to(wide)
            edit, total = losses(logits, reference, prompt, target, delta, settings)
            result.losses.append((float(total.detach()), float(edit.detach())))
            if not result.losses[-1][1] >= -math.log(settings.stop):
                break

            adam.zero_grad()
            total.backward()
            adam.step()
            result.steps += 1

    result.delta = delta.detach()
    return result


def losses(
    logits: Tensor,
    reference: Tensor,
    prompt: Sequence[int],
    target: Sequence[int],
    delta: Tensor,
    settings: FineSettings,
) -> tuple[Tensor, Tensor]:
    """The edit loss and the sum of all four losses.

    logits: (P + S, n_vocabulary); reference: (P - 1, n_vocabulary), log-probabilities before the edit"""
    n_prompt = len(prompt)
    tokens = torch.tensor(target)
    scored = logits[n_prompt - 1 : n_prompt - 1 + len(target)].log_softmax(-1)
    edit = -scored[torch.arange(len(target)), tokens].min()
    total = edit + settings.size * delta.norm()
    if n_prompt > 1:
        now = logits[: n_prompt - 1].log_softmax(-1)
        total = total + settings.kl * (reference.exp() * (reference - now)).sum(-1).mean()

    said = logits[-1].softmax(-1)[tokens]
    return edit, total - settings.repeat * torch.log((1 - said).clamp_min(1e-6)).min()


@torch.no_grad()
def write(downs: Sequence[Any], result: FineResult) -> list[tuple[int, int, Tensor]]:
    """Add the vectors to the columns; returns (layer, neuron, old column) of each slot, for `undo`."""
    saved: list[tuple[int, int, Tensor]] = []
    for (layer, neuron), vector in zip(result.slots, result.delta, strict=True):
        column = weight_of(downs[layer])[:, neuron]
        saved.append((layer, neuron, column.clone()))
        column += vector.to(column.dtype)
    return saved


@torch.no_grad()
def undo(downs: Sequence[Any], saved: Sequence[tuple[int, int, Tensor]]) -> None:
    """Restore the columns, the last written one first."""
    for layer, neuron, column in reversed(saved):
        weight_of(downs[layer])[:, neuron] = column
