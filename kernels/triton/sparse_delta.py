"""Changed columns, sample by sample, and both gradients on the device. The definition is that of
`fastedit.ops.sparse_delta`.

A tile of rows finds the samples of its rows by bisection, gathers their activations at the slots of those samples (0 at
the slots of others) and multiplies them with the vectors. The gradient of the vectors is the same with rows and slots
exchanged. The host does not know the samples' sizes. A column named more than twice in one sample gets its parts of the
activations' gradient in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastedit.kernels._launch import cdiv, checked, dtype_of, not_worth, on_device_of, tl, triton, unavailable

if TYPE_CHECKING:
    from fastedit.ops.sparse_delta import SparseDelta


def supports(args: SparseDelta) -> str | None:
    """None, or why the kernels cannot take these arguments, of the sum or of its gradients."""
    return unavailable(args)


def worth(args: SparseDelta) -> str | None:
    """None, or why the kernels are not the faster choice."""
    return not_worth()


@dataclass(frozen=True)
class Config:
    """rows, columns: sides of a tile of the result; inner: slots (or rows) multiplied at a time."""

    rows: int
    columns: int
    inner: int
    num_warps: int


def config() -> Config:
    """The launch for all sizes; the host does not know those of the samples.

    rows     16, the least that a matrix product takes: a sample of FiNE has a few tens of rows
    columns  64 of d_model: a slot's vector is read in runs of 256 bytes
    inner    16, again the least: FiNE has about ten slots per sample
    """
    return Config(16, 64, 16, 4)


@triton.jit
def _samples_of(item, starts, n_samples, n_halvings):
    """The last sample whose first item is not after `item`, [ITEMS]; an empty sample is never the last one."""
    low = tl.zeros_like(item)
    high = low + n_samples
    for _ in range(n_halvings):
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= item
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _sum_kernel(
    activations, index, own_starts, other_starts, vectors, out, scale: tl.float64, n_samples, n_halvings, n_items,
    n_columns, a_row, a_column, index_stride, vector_row, vector_column,
    OF_SLOTS: tl.constexpr, DTYPE: tl.constexpr, ITEMS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[i] = scale * sum over the others o of i's sample of a(i, o) * vectors[o].

    Items are rows and others slots, a(i, o) = a[i, index[o]]; with OF_SLOTS items are slots, others rows."""
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)  # [ITEMS]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    item_there = item < n_items

    # The padding belongs to the last item's sample, so that the first and the last bound enclose those of every item.
    sample = _samples_of(tl.minimum(item, n_items - 1), own_starts, n_samples, n_halvings)
    first = tl.load(other_starts + sample).to(tl.int32)  # [ITEMS]
    last = tl.load(other_starts + sample + 1).to(tl.int32)
    if OF_SLOTS:
        own = tl.load(index + item * index_stride, mask=item_there, other=0) * a_column
    else:
        own = item.to(tl.int64) * a_row

    total = tl.zeros((ITEMS, COLUMNS), DTYPE)
    broken = tl.zeros((ITEMS, COLUMNS), tl.float32)
    stop = tl.max(last, 0)
    for base in range(tl.min(first, 0), stop, INNER):
        other = base + tl.arange(0, INNER)  # [INNER]
        other_there = other < stop
        if OF_SLOTS:
            across = other.to(tl.int64) * a_row
        else:
            across = tl.load(index + other * index_stride, mask=other_there, other=0) * a_column

        shared = (other[None, :] >= first[:, None]) & (other[None, :] < last[:, None]) & item_there[:, None]
        a = tl.load(activations + own[:, None] + across[None, :], mask=shared, other=0.0)  # [ITEMS, INNER]
        place = other.to(tl.int64)[:, None] * vector_row + column[None, :] * vector_column
        v = tl.load(vectors + place, mask=other_there[:, None] & (column < n_columns)[None, :], other=0.0)
        # 0 times Inf is NaN: a vector that is not finite would reach the items of other samples in this tile.
        finite = (v - v) == 0.0
        total = tl.dot(a.to(DTYPE), tl.where(finite, v, 0.0), total, input_precision="ieee", out_dtype=DTYPE)
        own_broken = tl.where(finite, 0.0, 1.0)
        broken = tl.dot(shared.to(tl.float32), own_broken, broken, input_precision="ieee", out_dtype=tl.float32)

    total = tl.where(broken > 0.0, float("nan"), total)
    place = item.to(tl.int64)[:, None] * n_columns + column[None, :]
    mask = item_there[:, None] & (column < n_columns)[None, :]
    tl.store(out + place, tl.full((), scale, DTYPE) * total, mask=mask)


@triton.jit
def _pull_kernel(
    grad, delta, index, row_starts, slot_starts, out, scale: tl.float64, n_samples, n_halvings, n_rows, d_model, d_ff,
    grad_row, grad_column, delta_row, delta_column, index_stride,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[p, index[r]] += scale * <delta[r], grad[p]> for the slots r of p's sample; out starts as zeros."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    row_there = row < n_rows
    sample = _samples_of(tl.minimum(row, n_rows - 1), row_starts, n_samples, n_halvings)
    first = tl.load(slot_starts + sample).to(tl.int32)  # [ROWS]
    last = tl.load(slot_starts + sample + 1).to(tl.int32)

    stop = tl.max(last, 0)
    for base in range(tl.min(first, 0), stop, INNER):
        slot = base + tl.arange(0, INNER)  # [INNER]
        slot_there = slot < stop
        total = tl.zeros((ROWS, INNER), DTYPE)
        for start in range(0, d_model, DEPTH):
            column = start + tl.arange(0, DEPTH)  # [DEPTH]
            inside = column < d_model
            place = row.to(tl.int64)[:, None] * grad_row + column[None, :] * grad_column
            g = tl.load(grad + place, mask=row_there[:, None] & inside[None, :], other=0.0)
            place = slot.to(tl.int64)[None, :] * delta_row + column[:, None] * delta_column
            v = tl.load(delta + place, mask=slot_there[None, :] & inside[:, None], other=0.0)
            total = tl.dot(g, v, total, input_precision="ieee", out_dtype=DTYPE)

        shared = (slot[None, :] >= first[:, None]) & (slot[None, :] < last[:, None]) & row_there[:, None]
        target = tl.load(index + slot * index_stride, mask=slot_there, other=0)
        place = row.to(tl.int64)[:, None] * d_ff + target[None, :]
        # Two slots may name one column.
        tl.atomic_add(out + place, tl.full((), scale, DTYPE) * total, mask=shared, sem="relaxed")


def sparse_delta(args: SparseDelta) -> Tensor:
    """y, (n_rows, d_model). Never waits for the device."""
    args = _ready(args)
    return _sum(args, args.row_starts, args.slot_starts, args.delta, args.activations.shape[0], of_slots=False)


def sparse_delta_grads(args: SparseDelta) -> tuple[Tensor, Tensor]:
    """The gradients of activations (n_rows, d_ff) and delta (n_slots, d_model). Never waits for the device."""
    args = _ready(args)
    activations, row_starts, index, slot_starts, delta, scale, grad = args
    of_delta = _sum(args, slot_starts, row_starts, grad, delta.shape[0], of_slots=True)

    n_samples, launch = len(row_starts) - 1, config()
    (n_rows, d_ff), d_model = activations.shape, delta.shape[1]
    of_activations = torch.zeros(n_rows, d_ff, dtype=delta.dtype, device=delta.device)
    if of_activations.numel() and delta.numel():
        with on_device_of(delta):
            _pull_kernel[(cdiv(n_rows, launch.rows),)](
                grad, delta, index, row_starts, slot_starts, of_activations, float(scale), n_samples,
                n_samples.bit_length(), n_rows, d_model, d_ff, *grad.stride(), *delta.stride(), index.stride(0),
                DTYPE=dtype_of(delta.dtype), ROWS=launch.rows, INNER=launch.inner, DEPTH=launch.columns,
                num_warps=launch.num_warps,
            )  # fmt: skip
    return of_activations.to(activations.dtype), of_delta


def _ready(args: SparseDelta) -> SparseDelta:
    """The arguments with contiguous starts and a checked index."""
    return args._replace(
        row_starts=args.row_starts.contiguous(),
        index=checked(args.index, args.activations.shape[1]),
        slot_starts=args.slot_starts.contiguous(),
    )


def _sum(
    args: SparseDelta, own_starts: Tensor, other_starts: Tensor, vectors: Tensor, n_items: int, of_slots: bool
) -> Tensor:
    """(n_items, d_model), see `_sum_kernel`: with own_starts the items' samples, with other_starts the others'."""
    activations, index = args.activations, args.index
    n_samples, launch = len(own_starts) - 1, config()
    out = torch.empty(n_items, vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    if out.numel() == 0:
        return out

    with on_device_of(vectors):
        _sum_kernel[(cdiv(n_items, launch.rows), cdiv(vectors.shape[1], launch.columns))](
            activations, index, own_starts, other_starts, vectors, out, float(args.scale), n_samples,
            n_samples.bit_length(), n_items, vectors.shape[1], *activations.stride(), index.stride(0),
            *vectors.stride(), OF_SLOTS=of_slots, DTYPE=dtype_of(vectors.dtype), ITEMS=launch.rows,
            COLUMNS=launch.columns, INNER=launch.inner, num_warps=launch.num_warps,
        )  # fmt: skip
    return out
