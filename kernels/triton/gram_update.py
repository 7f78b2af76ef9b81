"""H += K^T K on the device, in place. The definition is that of `fastedit.ops.gram_update`.

One program per tile of the lower triangle, which it reads, adds to and writes twice; no other program reads what it
writes. Products and sums are IEEE, in the dtype of H.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastedit.kernels._launch import (
    cdiv,
    dtype_of,
    first,
    not_worth,
    on_device_of,
    tl,
    triton,
    unavailable,
    wrong_dtype,
)
from fastedit.kernels.masked_gram import add_products, config, lower_tile, store_both

if TYPE_CHECKING:
    from fastedit.ops.gram_update import GramUpdate


def supports(args: GramUpdate) -> str | None:
    """None, or why the kernel cannot take these arguments."""
    return first(unavailable(args), wrong_dtype("history", args.history, torch.float32, torch.float64))


def worth(args: GramUpdate) -> str | None:
    """None, or why the kernel is not the faster choice."""
    return not_worth()


@triton.jit
def _update_kernel(
    history, keys, n_edits, size, history_row, history_column, keys_row, keys_neuron,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """H[i, j] += sum_r K[r, i] K[r, j]."""
    tile_row, tile_column = lower_tile(tl.program_id(0))
    i = tile_row * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    j = tile_column * BLOCK + tl.arange(0, BLOCK)
    left = i.to(tl.int64)
    right = j.to(tl.int64)

    total = tl.zeros((BLOCK, BLOCK), DTYPE)
    total = add_products(
        total, keys, n_edits, keys_row, keys_neuron, left, right, i < size, j < size, keys, 0, False, ROWS, DTYPE
    )

    # Above the diagonal of a diagonal tile another thread may already have written; that part is not used.
    place = left[:, None] * history_row + right[None, :] * history_column
    total += tl.load(history + place, mask=(i < size)[:, None] & (j < size)[None, :], other=0.0)
    store_both(history, total, i, j, history_row, history_column, size)


def gram_update(args: GramUpdate) -> None:
    """H += K^T K in place. The launch configuration is that of masked_gram."""
    history, keys = args
    n_edits, size = keys.shape
    if size == 0:
        return

    launch = config(history.dtype)
    tiles = cdiv(size, launch.block)
    with on_device_of(history):
        _update_kernel[(tiles * (tiles + 1) // 2,)](
            history, keys, n_edits, size, *history.stride(), *keys.stride(),
            DTYPE=dtype_of(history.dtype),
            BLOCK=launch.block, ROWS=launch.rows, num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
