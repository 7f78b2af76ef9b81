"""score_neurons at 4 slots (an edit of FiNE) and at 100, the five best of each: float32 on the CPU, bf16 on a GPU.

Bytes: W, activations and directions once, values and indices written.  Operations: 2 per slot and element of W, 1 per
score.  At 4 slots the yardstick is one scan of W, at 100 the product without the selection.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import Cost, Setting, setting, size_of
from torch import Tensor

from fastedit.ops.score_neurons import BestNeurons, score_neurons
from fastedit.testing import Factory

# Every layer has its own W.
COLD = True
TOP = 5


def sweep(models: list[str], device: str) -> list[Setting]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [setting(model, f"slots={slots}", dtype, n_edits=slots) for model in models for slots in (4, 100)]


def memory(at: Setting) -> int:
    """Bytes, at most, that inputs and one call need; the factory draws in float64."""
    return 3 * 8 * at.case.d_ff * at.case.d_model


def inputs(at: Setting, device: str) -> tuple[Any, ...]:
    return (*Factory(at.case, at.dtype, device).scored(), TOP)


def call(given: tuple[Any, ...]) -> BestNeurons:
    return score_neurons(*given)


def topk(given: tuple[Any, ...]) -> BestNeurons:
    """Product, scale, torch's own top-k: ties in any order."""
    activations, weight, directions, top = given
    return BestNeurons(*torch.mm(directions, weight).mul_(activations).float().topk(top, dim=1))


def scan(given: tuple[Any, ...]) -> Tensor:
    """W read once."""
    return given[1].sum()


def product(given: tuple[Any, ...]) -> Tensor:
    """The matrix product alone."""
    return given[2] @ given[1]


PLAIN = {"torch: product, topk": topk}
YARDSTICKS = {"yardstick: scan of W": scan, "yardstick: product": product}


def results(given: tuple[Any, ...], made: BestNeurons) -> tuple[Tensor, ...]:
    # In bf16 torch rounds the scores, so that neurons with nearly equal scores change places.
    return (made.values,) if given[1].dtype != torch.bfloat16 else (made.values.bfloat16(),)


def cost(at: Setting, given: tuple[Any, ...], device: str) -> Cost:
    activations, weight, directions, top = given
    n_slots, (d_model, d_ff) = activations.shape[0], weight.shape
    moved = size_of(activations, weight, directions) + n_slots * top * (4 + 8)
    return Cost(moved, n_slots * d_ff * (2 * d_model + 1), weight.dtype)
