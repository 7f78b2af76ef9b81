"""One Adam step over the rows of (n, d) deltas, with the norm penalty and the norm bound folded in.

g = grad + decay * delta / ||delta||          gradient of decay * ||delta||, 0 at delta = 0
m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
delta -= lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
delta *= min(1, radius / ||delta||)           m and v stay as they are
Adam: Kingma & Ba 2015. Penalty and bound: value optimisation of MEMIT and its successors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.ops._check import require, require_dtype, require_one_device, require_writable
from fastedit.ops._dispatch import run

# Norms between which the squares of a float32 row neither vanish nor overflow.
SMALLEST, LARGEST = 1e-15, 1e18


@dataclass(frozen=True)
class AdamSettings:
    """Constants of the step: learning rate, decay rates of the two moments, and the denominator's floor."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


def sparse_adam(
    delta: Tensor,
    grad: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    step: int,
    settings: AdamSettings,
    decay: Tensor | None = None,
    radius: Tensor | None = None,
) -> None:
    """Update delta, moment1 and moment2 in place.

    delta, grad, moment1, moment2: (n, d) float32 or float64, same dtype and device
    step: number of this step, counted from 1
    decay: (n,) weight of the norm penalty per row, or None
    radius: (n,) largest norm of a row after the step, or None
    Raises ValueError for wrong shapes, step < 1, tensors on several devices or state whose elements share memory,
    TypeError for other or mixed dtypes.
    """
    args = SparseAdam(delta, grad, moment1, moment2, step, settings, decay, radius)
    check(args)
    run("sparse_adam", args, written=(delta, moment1, moment2))


class SparseAdam(NamedTuple):
    """The arguments of `sparse_adam`, in its order."""

    delta: Tensor
    grad: Tensor
    moment1: Tensor
    moment2: Tensor
    step: int
    settings: AdamSettings
    decay: Tensor | None = None
    radius: Tensor | None = None


def check(args: SparseAdam) -> None:
    """Raise ValueError or TypeError for arguments that `sparse_adam` does not take."""
    delta = args.delta
    require_one_device("sparse_adam", args)
    require("sparse_adam", "delta", delta, (None, None))
    require_dtype("sparse_adam", "delta", delta, torch.float32, torch.float64)
    require("sparse_adam", "grad", args.grad, delta.shape, delta)
    require("sparse_adam", "moment1", args.moment1, delta.shape, delta)
    require("sparse_adam", "moment2", args.moment2, delta.shape, delta)

    if args.decay is not None:
        require("sparse_adam", "decay", args.decay, delta.shape[:1], delta)
    if args.radius is not None:
        require("sparse_adam", "radius", args.radius, delta.shape[:1], delta)
    if args.step < 1:
        raise ValueError(f"sparse_adam: step must be at least 1, got {args.step}")
    require_writable("sparse_adam", args, "delta", "moment1", "moment2")


def sparse_adam_ref(
    delta: Tensor,
    grad: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    step: int,
    settings: AdamSettings,
    decay: Tensor | None = None,
    radius: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The step out of place, in the dtype of its inputs; returns (delta, moment1, moment2)."""
    if decay is not None:
        norm = _lengths(delta)
        grad = grad + torch.where(norm > 0, decay[:, None] * delta / norm, torch.zeros_like(delta))

    moment1 = settings.beta1 * moment1 + (1 - settings.beta1) * grad
    moment2 = settings.beta2 * moment2 + (1 - settings.beta2) * grad * grad
    denominator = _root(moment2, 1 - settings.beta2**step) + settings.eps
    delta = delta - settings.lr * (moment1 / (1 - settings.beta1**step)) / denominator

    if radius is not None:
        norm = _lengths(delta)
        delta = torch.where(norm > radius[:, None], delta * (radius[:, None] / norm), delta)
    return delta, moment1, moment2


def sparse_adam_torch(args: SparseAdam) -> None:
    """The step in place, in plain torch."""
    delta, moment1, moment2 = sparse_adam_ref(*args)
    args.delta.copy_(delta)
    args.moment1.copy_(moment1)
    args.moment2.copy_(moment2)


def _lengths(rows: Tensor) -> Tensor:
    """The norm of every row, (n, 1). Where squares overflow or vanish in float32 they are taken in float64."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if rows.dtype == torch.float64:
        return norm

    wide = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).to(rows.dtype)
    return torch.where((norm > SMALLEST) & (norm < LARGEST), norm, wide)


def _root(moment: Tensor, bias: float) -> Tensor:
    """sqrt(moment / bias), also where only the quotient overflows."""
    root = (moment / bias).sqrt()
    return torch.where(root.isinf(), moment.sqrt() / bias**0.5, root)
