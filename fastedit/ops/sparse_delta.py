"""Changed columns of a down-projection, sample by sample: y[p] = scale * sum_r a[p, index[r]] * delta[r].

The sum runs over the slots r of the sample that row p belongs to. Every sample has its own list of columns and its own
vectors, so many edits are trained in one pass over one weight. A column named twice counts twice. With FiNE every edit
is a sample; KNE's ensemble, which a batch shares, is one sample that owns all rows and slots. NaN and Inf of one sample
reach no other: one edit may diverge while the others are trained.

A backend has two functions, `sparse_delta` and `sparse_delta_grads`. Both take the record `SparseDelta`, whose `grad`
is None for the first.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastedit.ops import _dispatch
from fastedit.ops._check import require, require_dtype, require_one_device

DELTA_DTYPES = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)


class DeltaGrads(NamedTuple):
    """activations: (n_rows, d_ff), in the dtype of the activations, zero but at slots; delta: (n_slots, d_model)."""

    activations: Tensor
    delta: Tensor


def sparse_delta(
    activations: Tensor, row_starts: Tensor, index: Tensor, slot_starts: Tensor, delta: Tensor, scale: float = 1.0
) -> Tensor:
    """y, (n_rows, d_model), in the dtype of delta; differentiable in activations and delta.

    activations: (n_rows, d_ff) in the dtype of delta, or bf16 or fp16 beside a float32 delta
    row_starts: (n_samples + 1,) int64: rows row_starts[s] .. row_starts[s + 1] belong to sample s; from 0 to n_rows
    index: (n_slots,) int64, columns in [0, d_ff)
    slot_starts: (n_samples + 1,) int64, likewise for slots; from 0 to n_slots
    delta: (n_slots, d_model) float32 or float64
    Raises ValueError for shapes, for tensors on several devices and, on the CPU, for starts or columns out of range
    (elsewhere the check would wait for the device), TypeError for dtypes.
    """
    args = SparseDelta(activations, row_starts, index, slot_starts, delta, scale)
    check(args, "sparse_delta")
    y: Tensor = _SparseDelta.apply(*args[:-1])  # type: ignore[no-untyped-call]
    return y


def sparse_delta_grads(
    activations: Tensor,
    row_starts: Tensor,
    index: Tensor,
    slot_starts: Tensor,
    delta: Tensor,
    scale: float,
    grad: Tensor,
) -> DeltaGrads:
    """The gradients of a loss with dL/dy = grad, (n_rows, d_model) in the dtype of delta; other arguments as above.

    dL/ddelta[r] = scale * sum_p a[p, index[r]] * grad[p], over the rows p of r's sample
    dL/da[p, j] = scale * sum_r <delta[r], grad[p]>, over the slots r of p's sample with index[r] = j
    """
    args = SparseDelta(activations, row_starts, index, slot_starts, delta, scale, grad)
    check(args, "sparse_delta_grads")
    require("sparse_delta_grads", "grad", grad, (activations.shape[0], delta.shape[1]), delta)
    return DeltaGrads(*_dispatch.run("sparse_delta", args, "sparse_delta_grads"))


class SparseDelta(NamedTuple):
    """The arguments of `sparse_delta`, in its order, and the gradient of `sparse_delta_grads`."""

    activations: Tensor
    row_starts: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    slot_starts: Tensor
    delta: Tensor
    scale: float = 1.0
    grad: Tensor | None = None


def check(args: SparseDelta, function: str) -> None:
    """Raise ValueError or TypeError for arguments that `function` does not take; `grad` is not looked at."""
    activations, row_starts, index, slot_starts, delta, _, _ = args
    require_one_device(function, args)
    require(function, "delta", delta, (None, None))
    require_dtype(function, "delta", delta, *DELTA_DTYPES)
    require(function, "activations", activations, (None, None))
    require_dtype(function, "activations", activations, delta.dtype, *(HALF if delta.dtype == torch.float32 else ()))
    require(function, "index", index, delta.shape[:1])
    require(function, "row_starts", row_starts, (None,))
    require(function, "slot_starts", slot_starts, row_starts.shape)

    for name, value in (("index", index), ("row_starts", row_starts), ("slot_starts", slot_starts)):
        require_dtype(function, name, value, torch.int64)

    if delta.device.type == "cpu":
        _check_ranges(args, function)


def _check_ranges(args: SparseDelta, function: str) -> None:
    n_rows, d_ff = args.activations.shape
    n_slots = args.delta.shape[0]
    for name, starts, total in (("row_starts", args.row_starts, n_rows), ("slot_starts", args.slot_starts, n_slots)):
        numbers = starts.tolist()
        if not numbers or numbers[0] != 0 or numbers[-1] != total or numbers != sorted(numbers):
            shown = f"{numbers[:4]} ... {numbers[-1:]}"
            raise ValueError(f"{function}: {name} must ascend from 0 to {total}, got {shown}")

    index = args.index
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= d_ff):
        raise ValueError(f"{function}: index must be in [0, {d_ff}), got {index.min()} to {index.max()}")


def sparse_delta_ref(
    activations: Tensor, row_starts: Tensor, index: Tensor, slot_starts: Tensor, delta: Tensor, scale: float = 1.0
) -> Tensor:
    """The definition, sample by sample; autograd gives its gradients."""
    parts = [activations[:0, :0].to(delta.dtype) @ delta[:0]]
    for sample in range(len(row_starts) - 1):
        rows = slice(int(row_starts[sample]), int(row_starts[sample + 1]))
        slots = slice(int(slot_starts[sample]), int(slot_starts[sample + 1]))
        parts.append(scale * activations[rows][:, index[slots]].to(delta.dtype) @ delta[slots])
    return torch.cat(parts)


def sparse_delta_torch(args: SparseDelta) -> Tensor:
    """The sum in plain torch: one product with the rows' activations at all slots, zero at those of other samples."""
    own = _own_slots(args)
    return _own_sums(_at_slots(args, own), own, args.delta).mul_(args.scale)


def sparse_delta_grads_torch(args: SparseDelta) -> DeltaGrads:
    """The two gradients in plain torch."""
    activations, grad = args.activations, args.grad
    if grad is None:
        raise ValueError("sparse_delta_grads: grad is missing")

    own = _own_slots(args)
    pulled = torch.mm(grad, args.delta.T).mul_(args.scale).masked_fill_(~own, 0)
    of_activations = grad.new_zeros(activations.shape).index_add_(1, args.index, pulled)
    of_delta = _own_sums(_at_slots(args, own).T, own.T, grad).mul_(args.scale)
    return DeltaGrads(of_activations.to(activations.dtype), of_delta)


class _SparseDelta(torch.autograd.Function):
    """Forward and backward through the dispatcher. Takes the fields of SparseDelta but `grad`."""

    @staticmethod
    def forward(ctx: Any, *fields: Any) -> Tensor:
        args = SparseDelta(*fields)
        ctx.save_for_backward(args.activations, args.row_starts, args.index, args.slot_starts, args.delta)
        ctx.scale = args.scale
        # On a GPU autograd runs the backward in a thread of its own, which does not see the caller's choice of backend.
        ctx.backend = _dispatch.wanted()
        return _dispatch.run("sparse_delta", args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        activations, row_starts, index, slot_starts, delta = ctx.saved_tensors
        grad = grads[0].contiguous()
        args = SparseDelta(activations, row_starts, index, slot_starts, delta, ctx.scale, grad)
        with contextlib.nullcontext() if ctx.backend is None else _dispatch.backend(ctx.backend):
            of_activations, of_delta = _SparseDeltaGrads.apply(*args)  # type: ignore[no-untyped-call]
        return of_activations, None, None, None, of_delta, None


class _SparseDeltaGrads(torch.autograd.Function):
    """The gradients, which have none themselves. Takes the fields of SparseDelta."""

    @staticmethod
    def forward(ctx: Any, *fields: Any) -> tuple[Tensor, Tensor]:
        of_activations, of_delta = _dispatch.run("sparse_delta", SparseDelta(*fields), "sparse_delta_grads")
        return of_activations, of_delta

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("sparse_delta: has first derivatives only, a gradient of its gradient was wanted")


def _own_sums(factors: Tensor, own: Tensor, vectors: Tensor) -> Tensor:
    """factors @ vectors, where factors (n, m) are 0 where `own` (n, m) is False: a row is of another sample.

    0 times Inf is NaN, so vectors (m, d) that are not finite are left out, and the rows that own one become NaN. On a
    GPU nothing waits for the device."""
    finite = vectors.isfinite()
    if vectors.device.type == "cpu" and bool(finite.all()):
        return torch.mm(factors, vectors)

    broken = (own & ~finite.all(1)).any(1, keepdim=True)
    return torch.mm(factors, torch.where(finite, vectors, 0)).masked_fill_(broken, float("nan"))


def _at_slots(args: SparseDelta, own: Tensor) -> Tensor:
    """a[p, index[r]] where row p and slot r are of one sample, 0 elsewhere, (n_rows, n_slots)."""
    at_slots = args.activations.index_select(1, args.index).to(args.delta.dtype)
    return at_slots.masked_fill_(~own, 0)


def _own_slots(args: SparseDelta) -> Tensor:
    """(n_rows, n_slots) bool: row and slot are of one sample."""
    samples = torch.arange(len(args.row_starts) - 1, device=args.row_starts.device)
    of_row = samples.repeat_interleave(args.row_starts.diff(), output_size=args.activations.shape[0])
    of_slot = samples.repeat_interleave(args.slot_starts.diff(), output_size=args.index.shape[0])
    return of_row[:, None] == of_slot[None]
