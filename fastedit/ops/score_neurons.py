"""Contribution scores of neurons, score[i, j] = a[i, j] * <W[:, j], g[i]>.

A neuron adds its activation times its column of W to the residual stream; the score is that vector's component along a
direction. FiNE's direction is the unembedding row of a token (how much the neuron raises its logit); that of KNE and KN
is the gradient of a probability with respect to the down-projection's output (activation times gradient).
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from fastedit.ops._check import require, require_dtype, require_one_device
from fastedit.ops._dispatch import run

SCORE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Slots whose scores plain torch holds at once when only the best are kept: 64 x 16384 float32 are 4 MB.
BLOCK = 64


class BestNeurons(NamedTuple):
    """Per slot its k best neurons, descending: values (n_slots, k), neurons (n_slots, k) int64."""

    values: Tensor
    neurons: Tensor


@overload
def score_neurons(activations: Tensor, weight: Tensor, directions: Tensor, top_k: None = None) -> Tensor: ...
@overload
def score_neurons(activations: Tensor, weight: Tensor, directions: Tensor, top_k: int) -> BestNeurons: ...
def score_neurons(
    activations: Tensor, weight: Tensor, directions: Tensor, top_k: int | None = None
) -> Tensor | BestNeurons:
    """Scores (n_slots, d_ff) in float32 (float64 for float64 inputs), or the `top_k` best of every slot.

    activations: (n_slots, d_ff), the input of the down-projection
    weight: (d_model, d_ff), the down-projection
    directions: (n_slots, d_model)
    All of one dtype, one of SCORE_DTYPES; products and sums are taken in the dtype of the result.
    top_k: signed, in [1, d_ff]; smallest index first among equal scores; a NaN ranks before every number. The scores
        of all slots are then never held at once.
    Raises ValueError for shapes, top_k or tensors on several devices, TypeError for dtypes.
    """
    args = ScoreNeurons(activations, weight, directions, top_k)
    check(args)
    scores = run("score_neurons", args)
    return scores if top_k is None else BestNeurons(*scores)


class ScoreNeurons(NamedTuple):
    """The arguments of `score_neurons`, in its order. With `top_k` a backend returns the two fields of BestNeurons."""

    activations: Tensor
    weight: Tensor
    directions: Tensor
    top_k: int | None = None


def check(args: ScoreNeurons) -> None:
    """Raise ValueError or TypeError for arguments that `score_neurons` does not take."""
    activations, weight, directions, top_k = args
    require_one_device("score_neurons", args)
    require("score_neurons", "weight", weight, (None, None))
    require_dtype("score_neurons", "weight", weight, *SCORE_DTYPES)

    d_model, d_ff = weight.shape
    require("score_neurons", "activations", activations, (None, d_ff), weight)
    require("score_neurons", "directions", directions, (activations.shape[0], d_model), weight)
    if top_k is not None and not 1 <= top_k <= d_ff:
        raise ValueError(f"score_neurons: top_k must be in [1, {d_ff}], got {top_k}")


def score_neurons_ref(
    activations: Tensor, weight: Tensor, directions: Tensor, top_k: int | None = None
) -> Tensor | BestNeurons:
    """The definition, by a full stable sort."""
    working = torch.promote_types(weight.dtype, torch.float32)
    scores = activations.to(working) * (directions.to(working) @ weight.to(working))
    if top_k is None:
        return scores

    values, neurons = scores.sort(dim=1, descending=True, stable=True)
    return BestNeurons(values[:, :top_k], neurons[:, :top_k])


def score_neurons_torch(args: ScoreNeurons) -> Tensor | BestNeurons:
    """The scores in plain torch; with `top_k` block by block of slots."""
    activations, weight, directions, top_k = args
    working = torch.promote_types(weight.dtype, torch.float32)
    wide = weight.to(working)
    if top_k is None:
        return torch.mm(directions.to(working), wide).mul_(activations.to(working))

    values = wide.new_zeros(activations.shape[0], top_k)
    neurons = torch.zeros_like(values, dtype=torch.int64)
    for start in range(0, activations.shape[0], BLOCK):
        block = slice(start, start + BLOCK)
        scores = torch.mm(directions[block].to(working), wide).mul_(activations[block].to(working))
        values[block], neurons[block] = best(scores, top_k)
    return BestNeurons(values, neurons)


def best(scores: Tensor, k: int) -> BestNeurons:
    """The k largest of every row (n, d), descending, smallest index first among equals, NaN before every number."""
    lowest = scores.topk(k, dim=1).values[:, -1:]
    if bool(lowest.isnan().any()) or bool(scores.isnan().any()):
        return BestNeurons(*(part[:, :k] for part in scores.sort(dim=1, descending=True, stable=True)))

    # torch.topk takes any of the scores equal to the k-th largest; here the first of them are taken.
    above = scores > lowest
    tied = scores == lowest
    taken = above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))
    neurons = taken.nonzero()[:, 1].view(-1, k)

    values, order = scores.gather(1, neurons).sort(dim=1, descending=True, stable=True)
    return BestNeurons(values, neurons.gather(1, order))
