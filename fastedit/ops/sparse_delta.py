"""Changed columns of a down-projection, sample by sample: y[p] = scale * sum_r a[p, index[r]] * delta[r].

The sum runs over the slots r of the sample that row p belongs to. Every sample has its own list of columns and its own
vectors, so many edits are trained in one pass over one weight. A column named twice counts twice. One sample that owns
all rows and slots is an ensemble shared by a batch (KNE); with FiNE every edit is a sample.

A backend's module offers two functions with these arguments, `sparse_delta` and `sparse_delta_grads`; `supports` and
`worth` get the arguments of either (the second has one more, the gradient).
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastedit.ops import _dispatch
from fastedit.ops._check import require, require_dtype

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
    Raises ValueError for shapes and, on the CPU, for starts or columns out of range (elsewhere looking would wait for
    the device), TypeError for dtypes.
    """
    _check("sparse_delta", activations, row_starts, index, slot_starts, delta)
    y: Tensor = _SparseDelta.apply(activations, row_starts, index, slot_starts, delta, scale)  # type: ignore[no-untyped-call]
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
    _check("sparse_delta_grads", activations, row_starts, index, slot_starts, delta)
    require("sparse_delta_grads", "grad", grad, (activations.shape[0], delta.shape[1]), delta)
    arguments = (activations, row_starts, index, slot_starts, delta, scale, grad)
    return _dispatch.run("sparse_delta", *arguments, function="sparse_delta_grads")


def sparse_delta_torch(
    activations: Tensor, row_starts: Tensor, index: Tensor, slot_starts: Tensor, delta: Tensor, scale: float
) -> Tensor:
    """The sum in plain torch: one product with the rows' activations at all slots, zero at those of other samples."""
    return torch.mm(_at_slots(activations, row_starts, index, slot_starts, delta.dtype), delta).mul_(scale)


def sparse_delta_grads_torch(
    activations: Tensor,
    row_starts: Tensor,
    index: Tensor,
    slot_starts: Tensor,
    delta: Tensor,
    scale: float,
    grad: Tensor,
) -> DeltaGrads:
    """The two gradients in plain torch."""
    at_slots = _at_slots(activations, row_starts, index, slot_starts, delta.dtype)
    own = _own_slots(row_starts, slot_starts, *at_slots.shape)
    pulled = torch.mm(grad, delta.T).mul_(scale).masked_fill_(~own, 0)
    into = grad.new_zeros(activations.shape).index_add_(1, index, pulled)
    return DeltaGrads(into.to(activations.dtype), torch.mm(at_slots.T, grad).mul_(scale))


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


class _SparseDelta(torch.autograd.Function):
    """Forward and backward through the table."""

    @staticmethod
    def forward(
        ctx: Any,
        activations: Tensor,
        row_starts: Tensor,
        index: Tensor,
        slot_starts: Tensor,
        delta: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(activations, row_starts, index, slot_starts, delta)
        # A backward on a device runs in a thread of its own, which does not see the caller's choice of backend.
        ctx.scale, ctx.backend = scale, _dispatch.wanted()
        return _dispatch.run("sparse_delta", activations, row_starts, index, slot_starts, delta, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (*ctx.saved_tensors, ctx.scale, grads[0].contiguous())
        with contextlib.nullcontext() if ctx.backend is None else _dispatch.backend(ctx.backend):
            found: DeltaGrads = _dispatch.run("sparse_delta", *arguments, function="sparse_delta_grads")
        return found.activations, None, None, None, found.delta, None


def _at_slots(
    activations: Tensor, row_starts: Tensor, index: Tensor, slot_starts: Tensor, dtype: torch.dtype
) -> Tensor:
    """a[p, index[r]] where row p and slot r are of one sample, 0 elsewhere, (n_rows, n_slots)."""
    at_slots = activations.index_select(1, index).to(dtype)
    return at_slots.masked_fill_(~_own_slots(row_starts, slot_starts, *at_slots.shape), 0)


def _own_slots(row_starts: Tensor, slot_starts: Tensor, n_rows: int, n_slots: int) -> Tensor:
    """(n_rows, n_slots) bool: row and slot are of one sample."""
    samples = torch.arange(len(row_starts) - 1, device=row_starts.device)
    of_row = samples.repeat_interleave(row_starts.diff(), output_size=n_rows)
    of_slot = samples.repeat_interleave(slot_starts.diff(), output_size=n_slots)
    return of_row[:, None] == of_slot[None]


def _check(op: str, activations: Tensor, row_starts: Tensor, index: Tensor, slot_starts: Tensor, delta: Tensor) -> None:
    require(op, "delta", delta, (None, None))
    require_dtype(op, "delta", delta, *DELTA_DTYPES)
    require(op, "activations", activations, (None, None))
    require_dtype(op, "activations", activations, delta.dtype, *(HALF if delta.dtype == torch.float32 else ()))
    require(op, "index", index, delta.shape[:1])
    require(op, "row_starts", row_starts, (None,))
    require(op, "slot_starts", slot_starts, row_starts.shape)
    for name, value in (("index", index), ("row_starts", row_starts), ("slot_starts", slot_starts)):
        require_dtype(op, name, value, torch.int64)
        if value.device != delta.device:
            raise ValueError(f"{op}: {name} must be on {delta.device}, got {value.device}")
    if delta.device.type != "cpu":
        return
    ends = (("row_starts", row_starts, activations.shape[0]), ("slot_starts", slot_starts, delta.shape[0]))
    for name, starts, total in ends:
        found = starts.tolist()
        if not found or found[0] != 0 or found[-1] != total or found != sorted(found):
            raise ValueError(f"{op}: {name} must ascend from 0 to {total}, got {found[:4]} ... {found[-1:]}")
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= activations.shape[1]):
        raise ValueError(f"{op}: index must be in [0, {activations.shape[1]}), got {index.min()} to {index.max()}")
