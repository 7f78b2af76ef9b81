"""The system matrix of the selected neurons on the device. The definition is that of `fastedit.ops.masked_gram`.

A program computes one tile of the lower triangle and writes it twice, as it is and mirrored, so the matrix is
symmetric to the bit and only half of C and H is read. Rows and columns of C, H and the keys are gathered as they are
read; nothing of size (n_edits, k) or (k, d_ff) is written. The neurons are ascending, so the 32 columns of a warp are
close together. Products and sums are IEEE, in the dtype of the result (float64 on the matrix units; float32 never as
TF32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastedit.kernels._launch import cdiv, checked, dtype_of, not_worth, on_device_of, strides, tl, triton, unavailable

if TYPE_CHECKING:
    from fastedit.ops.masked_gram import MaskedGram


def supports(args: MaskedGram) -> str | None:
    """None, or why the kernel cannot take these arguments."""
    return unavailable(args)


def worth(args: MaskedGram) -> str | None:
    """None, or why the kernel is not the faster choice."""
    return not_worth()


@dataclass(frozen=True)
class Config:
    """block: side of a tile; rows: keys multiplied at a time."""

    block: int
    rows: int
    num_warps: int
    num_stages: int


def config(dtype: torch.dtype) -> Config:
    """The launch for a result dtype.

    block       64: the mirrored tile leaves in runs of 64 elements, and at 30 % of 14336 neurons there are 2278 tiles,
                17 for each of 132 multiprocessors; a float64 tile is 64 registers per thread on four warps
    rows        16: two float64 slabs of 16 x 64 are 16 KB of shared memory per stage, several programs fit
    num_stages  2: the products are few, and the gathers of C and H bound the time
    """
    return Config(64, 16, 8, 2)


@triton.jit
def lower_tile(number):
    """(row, column) of a tile counted row by row in the lower triangle: number = row (row + 1) / 2 + column."""
    row = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is off by less than one tile.
    row = tl.where(row * (row + 1) // 2 > number, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)
    return row, number - row * (row + 1) // 2


@triton.jit
def add_products(
    total, keys, n_rows, row_stride, neuron_stride, left, right, left_there, right_there, active, active_stride,
    HAS_ACTIVE: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """total[i, j] + sum over the (active) rows r of keys[r, left_i] * keys[r, right_j]."""
    for base in range(0, n_rows, ROWS):
        row = base + tl.arange(0, ROWS)  # [ROWS]
        there = row < n_rows
        if HAS_ACTIVE:
            there = there & (tl.load(active + row * active_stride, mask=there, other=0) != 0)
        line = keys + row.to(tl.int64)[:, None] * row_stride  # [ROWS, 1]
        a = tl.load(line + left[None, :] * neuron_stride, mask=there[:, None] & left_there[None, :], other=0.0)
        b = tl.load(line + right[None, :] * neuron_stride, mask=there[:, None] & right_there[None, :], other=0.0)
        total = tl.dot(tl.trans(a.to(DTYPE)), b.to(DTYPE), total, input_precision="ieee", out_dtype=DTYPE)
    return total


@triton.jit
def store_both(out, tile, i, j, row_stride, column_stride, size):
    """out[i, j] and out[j, i] = tile, of which only the part on or below the diagonal is taken."""
    below = (i[:, None] >= j[None, :]) & (i < size)[:, None]
    tl.store(out + i.to(tl.int64)[:, None] * row_stride + j[None, :] * column_stride, tile, mask=below)
    above = (j[:, None] < i[None, :]) & (i < size)[None, :]
    tl.store(out + j.to(tl.int64)[:, None] * row_stride + i[None, :] * column_stride, tl.trans(tile), mask=above)


@triton.jit
def _gram_kernel(
    moment, history, keys, past, active, index, count, out, weight: tl.float64, n_edits, n_past, size,
    moment_row, moment_column, history_row, history_column, keys_row, keys_neuron, past_row, past_neuron,
    active_stride, index_stride,
    HAS_HISTORY: tl.constexpr, HAS_PAST: tl.constexpr, HAS_ACTIVE: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_COUNT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A = weight * C[S, S] + H[S, S] + P_S^T P_S + K_S^T K_S, packed: A[i, j] at i * k + j."""
    if HAS_COUNT:
        size = tl.load(count).to(tl.int32)
    tile_row, tile_column = lower_tile(tl.program_id(0))
    if tile_row * BLOCK >= size:
        return
    i = tile_row * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    j = tile_column * BLOCK + tl.arange(0, BLOCK)

    i_there = i < size
    j_there = j < size
    if HAS_INDEX:
        left = tl.load(index + i * index_stride, mask=i_there, other=0)
        right = tl.load(index + j * index_stride, mask=j_there, other=0)
    else:
        left = i.to(tl.int64)
        right = j.to(tl.int64)
    both = i_there[:, None] & j_there[None, :]

    total = tl.zeros((BLOCK, BLOCK), DTYPE)
    if HAS_PAST:
        total = add_products(
            total, past, n_past, past_row, past_neuron, left, right, i_there, j_there, active, 0, False, ROWS, DTYPE
        )
    total = add_products(
        total, keys, n_edits, keys_row, keys_neuron, left, right, i_there, j_there, active, active_stride, HAS_ACTIVE,
        ROWS, DTYPE,
    )  # fmt: skip

    place = left[:, None] * moment_row + right[None, :] * moment_column
    scale = tl.full((), weight, DTYPE)
    total += scale * tl.load(moment + place, mask=both, other=0.0).to(DTYPE)
    if HAS_HISTORY:
        place = left[:, None] * history_row + right[None, :] * history_column
        total += tl.load(history + place, mask=both, other=0.0).to(DTYPE)

    store_both(out, total, i, j, size, 1, size)


def masked_gram(args: MaskedGram) -> Tensor:
    """A, (k, k) symmetric to the bit."""
    index = None if args.index is None else checked(args.index, args.keys.shape[1])
    return masked_gram_on_device(args._replace(index=index)).view(args.width, args.width)


def masked_gram_on_device(
    args: MaskedGram, count: Tensor | None = None, past: Tensor | None = None, active: Tensor | None = None
) -> Tensor:
    """The system matrix as a flat, packed buffer: A[i, j] at i * k + j for i, j < k. Never waits for the device.

    count: integer in device memory whose first element is k, at most the length of the index; None = all of the index
    past: (n_past, d_ff) float, more rows of keys; active: (n_edits,) bool, the rows of keys that count; None = all
    """
    moment, weight, keys, history, index, dtype = args
    out = torch.empty(args.width * args.width, dtype=dtype, device=keys.device)
    if args.width == 0:
        return out

    launch = config(dtype)
    tiles = cdiv(args.width, launch.block)
    # As 32-bit numbers: with a byte in the mask Triton 3.7 chooses a layout of float64 operands that it cannot lower.
    active = None if active is None else active.to(torch.int32)
    with on_device_of(keys):
        _gram_kernel[(tiles * (tiles + 1) // 2,)](
            moment, history, keys, past, active, index, count, out, float(weight),
            keys.shape[0], 0 if past is None else past.shape[0], args.width,
            *moment.stride(), *strides(history, 2), *keys.stride(), *strides(past, 2), *strides(active, 1),
            *strides(index, 1),
            HAS_HISTORY=history is not None, HAS_PAST=past is not None, HAS_ACTIVE=active is not None,
            HAS_INDEX=index is not None, HAS_COUNT=count is not None,
            DTYPE=dtype_of(dtype), BLOCK=launch.block, ROWS=launch.rows,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return out
