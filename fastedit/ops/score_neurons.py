"""Contribution scores of neurons, score[i, j] = a[i, j] * <W[:, j], g[i]>.

What neuron j adds to the residual stream at a slot is its activation times its column of W; the score is that vector's
component along a direction. FiNE's direction is the unembedding row of a token (the neuron's push on its logit), KNE's
and KN's the gradient of a probability with respect to the down-projection's output (activation times gradient).
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from fastedit.ops import _dispatch
from fastedit.ops._check import require, require_dtype

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
    Raises ValueError for shapes or top_k, TypeError for dtypes.
    """
    require("score_neurons", "weight", weight, (None, None))
    require_dtype("score_neurons", "weight", weight, *SCORE_DTYPES)
    d_model, d_ff = weight.shape
    require("score_neurons", "activations", activations, (None, d_ff), weight)
    require("score_neurons", "directions", directions, (activations.shape[0], d_model), weight)
    if top_k is not None and not 1 <= top_k <= d_ff:
        raise ValueError(f"score_neurons: top_k must be in [1, {d_ff}], got {top_k}")
    return _dispatch.run("score_neurons", activations, weight, directions, top_k)


def score_neurons_torch(
    activations: Tensor, weight: Tensor, directions: Tensor, top_k: int | None
) -> Tensor | BestNeurons:
    """The scores in plain torch; with `top_k` block by block of slots."""
    working = torch.promote_types(weight.dtype, torch.float32)
    wide = weight.to(working)
    if top_k is None:
        return torch.mm(directions.to(working), wide).mul_(activations.to(working))
    values = wide.new_zeros(activations.shape[0], top_k)
    index = torch.zeros_like(values, dtype=torch.int64)
    for start in range(0, activations.shape[0], BLOCK):
        block = slice(start, start + BLOCK)
        scores = torch.mm(directions[block].to(working), wide).mul_(activations[block].to(working))
        values[block], index[block] = best(scores, top_k)
    return BestNeurons(values, index)


def best(scores: Tensor, k: int) -> BestNeurons:
    """The k largest of every row (n, d), descending, smallest index first among equals, NaN before every number."""
    lowest = scores.topk(k, dim=1).values[:, -1:]
    above, tied = scores > lowest, scores == lowest
    # torch.topk takes any of the equals: of those at the bound, the first are taken here.
    taken = above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))
    if bool(lowest.isnan().any()) or bool(scores.isnan().any()):
        return BestNeurons(*(part[:, :k] for part in scores.sort(dim=1, descending=True, stable=True)))
    index = taken.nonzero()[:, 1].view(-1, k)
    values, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
    return BestNeurons(values, index.gather(1, order))


def score_neurons_ref(
    activations: Tensor, weight: Tensor, directions: Tensor, top_k: int | None = None
) -> Tensor | BestNeurons:
    """The definition, by a full stable sort."""
    working = torch.promote_types(weight.dtype, torch.float32)
    scores = activations.to(working) * (directions.to(working) @ weight.to(working))
    if top_k is None:
        return scores
    values, index = scores.sort(dim=1, descending=True, stable=True)
    return BestNeurons(values[:, :top_k], index[:, :top_k])
