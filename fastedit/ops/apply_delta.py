"""The update of a weight on selected neurons, W[:, S] += R^T X^T, rounded once.

R holds the residuals, row per edit; X the solution of the system, column per edit. A weight in half precision may
come with a float32 master, which takes the update; the weight is then the rounded master.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.ops._check import (
    require,
    require_dtype,
    require_float,
    require_in_range,
    require_one_device,
    require_writable,
)
from fastedit.ops._dispatch import run

WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def apply_delta(
    weight: Tensor, residual: Tensor, solution: Tensor, index: Tensor | None = None, master: Tensor | None = None
) -> None:
    """Add the update in place. The product is taken in float32 (float64 for float64 weights).

    weight: (d_model, d_ff) float32, float64, bf16 or fp16
    residual: (n_edits, d_model); solution: (k, n_edits), float32 or float64
    index: (k,) int64 selected neurons in [0, d_ff), or None for all; repeated indices add up
    master: (d_model, d_ff) float32 or float64, or None
    Raises ValueError for shapes, for tensors on several devices and for a weight or master whose elements share memory,
    TypeError for dtypes, IndexError for an index out of range.
    """
    args = ApplyDelta(weight, residual, solution, index, master)
    check(args)
    run("apply_delta", args, written=(weight, master))


class ApplyDelta(NamedTuple):
    """The arguments of `apply_delta`, in its order."""

    weight: Tensor
    residual: Tensor
    solution: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index
    master: Tensor | None = None


def check(args: ApplyDelta) -> None:
    """Raise ValueError or TypeError for arguments that `apply_delta` does not take."""
    weight, residual, solution, index, master = args
    require_one_device("apply_delta", args)
    require("apply_delta", "residual", residual, (None, None))
    require_float("apply_delta", "residual", residual)
    n_edits, d_model = residual.shape
    require("apply_delta", "weight", weight, (d_model, None))
    require_dtype("apply_delta", "weight", weight, *WEIGHT_DTYPES)

    if index is not None:
        require("apply_delta", "index", index, (None,))
        require_dtype("apply_delta", "index", index, torch.int64)
    width = weight.shape[1] if index is None else index.shape[0]
    require("apply_delta", "solution", solution, (width, n_edits))
    require_float("apply_delta", "solution", solution)

    if master is not None:
        require("apply_delta", "master", master, weight.shape)
        require_dtype("apply_delta", "master", master, torch.float32, torch.float64)
    require_writable("apply_delta", args, "weight", "master")


def apply_delta_ref(weight: Tensor, residual: Tensor, solution: Tensor, index: Tensor | None = None) -> Tensor:
    """The updated weight, (d_model, d_ff), in float32 or wider."""
    working = torch.promote_types(weight.dtype, torch.float32)
    delta = residual.to(working).T @ solution.to(working).T
    if index is None:
        return weight.to(working) + delta
    return weight.to(working).index_add(1, index, delta)


def apply_delta_torch(args: ApplyDelta) -> None:
    """The update in place, in plain torch."""
    weight, residual, solution, index, master = args
    if index is not None:
        require_in_range("apply_delta", "index", index, weight.shape[1])
    new = apply_delta_ref(weight if master is None else master, residual, solution, index)
    if master is not None:
        master.copy_(new)

    # Only selected columns are written: the others must keep their bits, -0.0 and NaN payloads included.
    if index is None:
        weight.copy_(new)
    else:
        weight[:, index] = new.index_select(1, index).to(weight.dtype)
