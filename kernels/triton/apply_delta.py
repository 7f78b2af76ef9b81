"""W[:, S] += R^T X^T on the device, in place. The definition is that of `fastedit.ops.apply_delta`.

Memory bounds the time: the columns are gathered, changed, rounded once and written in one pass. The first of the
positions that name a column owns it. The rows of X of the others are added to the owner's row beforehand, so that no
two programs write the same place and a run repeats bit for bit. Positions outside [0, d_ff) are skipped. Products are
IEEE float32, or float64 where the weight or its master is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastedit.kernels._launch import (
    cdiv,
    checked,
    dtype_of,
    first,
    not_worth,
    on_device_of,
    strides,
    tl,
    triton,
    unavailable,
    wrong_dtype,
)

if TYPE_CHECKING:
    from fastedit.ops.apply_delta import ApplyDelta


def supports(args: ApplyDelta) -> str | None:
    """None, or why the kernels cannot take these arguments."""
    return first(
        unavailable(args),
        wrong_dtype("residual", args.residual, torch.float32, torch.float64),
        wrong_dtype("solution", args.solution, torch.float32, torch.float64),
    )


def worth(args: ApplyDelta) -> str | None:
    """None, or why the kernels are not the faster choice."""
    return not_worth()


@dataclass(frozen=True)
class Config:
    """rows, columns: sides of a tile; edits: rows of R and columns of X multiplied at a time."""

    rows: int
    columns: int
    edits: int
    num_warps: int
    num_stages: int


def config() -> Config:
    """The launch for all sizes.

    rows, columns  64: a row of a tile is 128 bytes of a bf16 weight at least, and 64 x 68 tiles at 30 % of an 8B
                   model's neurons are 33 for each of 132 multiprocessors
    edits          16: two float64 slabs of 16 x 64 are 16 KB of shared memory per stage
    """
    return Config(64, 64, 16, 8, 2)


@triton.jit
def _owner_kernel(index, owner, copies, width, d_ff, index_stride, BLOCK: tl.constexpr):
    """owner[j] = the first position that names neuron j; copies[j] = the number of positions that do."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    neuron = tl.load(index + position * index_stride, mask=position < width, other=-1)
    there = (neuron >= 0) & (neuron < d_ff)
    tl.atomic_min(owner + neuron, position, mask=there, sem="relaxed")
    tl.atomic_add(copies + neuron, 1, mask=there, sem="relaxed")


@triton.jit
def _fold_kernel(
    index, owner, copies, solution, folded, width, d_ff, n_edits, index_stride, solution_row, solution_edit,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, EDITS: tl.constexpr,
):  # fmt: skip
    """folded[p] = X[p] + the sum of X[q] over the later positions q that name the same neuron, in the working dtype."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    edit = tl.program_id(1) * EDITS + tl.arange(0, EDITS)  # [EDITS]
    neuron = tl.load(index + position * index_stride, mask=position < width, other=-1)
    there = (neuron >= 0) & (neuron < d_ff)
    inside = (position < width)[:, None] & (edit < n_edits)[None, :]

    position64 = position.to(tl.int64)
    place = position64[:, None] * solution_row + edit[None, :] * solution_edit
    total = tl.load(solution + place, mask=inside, other=0.0).to(DTYPE)  # [BLOCK, EDITS]

    if tl.max(tl.load(copies + neuron, mask=there, other=0), 0) > 1:
        for q in range(width):
            same = there & (neuron == tl.load(index + q * index_stride)) & (q > position)  # [BLOCK]
            if tl.max(same.to(tl.int32), 0) > 0:
                row = solution + tl.cast(q, tl.int64) * solution_row
                more = tl.load(row + edit * solution_edit, mask=edit < n_edits, other=0.0).to(DTYPE)  # [EDITS]
                total += tl.where(same[:, None], more[None, :], 0.0)

    tl.store(folded + position64[:, None] * n_edits + edit[None, :], total, mask=inside)


@triton.jit
def _apply_kernel(
    weight, master, residual, solution, index, owner, d_model, d_ff, width, n_edits,
    weight_row, weight_column, master_row, master_column, residual_edit, residual_row, solution_row, solution_edit,
    index_stride,
    HAS_INDEX: tl.constexpr, HAS_MASTER: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EDITS: tl.constexpr,
):  # fmt: skip
    """new = (master or W)[:, S] + R^T X^T;  W[:, S] = rounded new, once."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    position = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    row_there = row < d_model
    there = position < width
    row64 = row.to(tl.int64)
    position64 = position.to(tl.int64)

    total = tl.zeros((ROWS, COLUMNS), DTYPE)
    for base in range(0, n_edits, EDITS):
        edit = base + tl.arange(0, EDITS)  # [EDITS]
        inside = edit < n_edits
        r_place = edit.to(tl.int64)[:, None] * residual_edit + row[None, :] * residual_row
        r = tl.load(residual + r_place, mask=inside[:, None] & row_there[None, :], other=0.0)
        x_place = position64[:, None] * solution_row + edit[None, :] * solution_edit
        x = tl.load(solution + x_place, mask=there[:, None] & inside[None, :], other=0.0)
        r = tl.trans(r.to(DTYPE))
        x = tl.trans(x.to(DTYPE))
        total = tl.dot(r, x, total, input_precision="ieee", out_dtype=DTYPE)

    if HAS_INDEX:
        column = tl.load(index + position * index_stride, mask=there, other=-1)
        there = (column >= 0) & (column < d_ff)
        there = there & (tl.load(owner + column, mask=there, other=-1) == position)
    else:
        column = position64

    mask = row_there[:, None] & there[None, :]
    w_place = weight + row64[:, None] * weight_row + column[None, :] * weight_column
    if HAS_MASTER:
        m_place = master + row64[:, None] * master_row + column[None, :] * master_column
        old = tl.load(m_place, mask=mask, other=0.0)
        new = old.to(DTYPE) + total
        tl.store(m_place, new, mask=mask)
    else:
        old = tl.load(w_place, mask=mask, other=0.0)
        new = old.to(DTYPE) + total
    tl.store(w_place, new.to(weight.dtype.element_ty), mask=mask)


def apply_delta(args: ApplyDelta) -> None:
    """The update in place. Never waits for the device."""
    weight, residual, solution, index, master = args
    (d_model, d_ff), (width, n_edits) = weight.shape, solution.shape
    if d_model == 0 or width == 0:
        return

    launch = config()
    wide = torch.promote_types((weight if master is None else master).dtype, torch.float32)
    owner = None
    with on_device_of(weight):
        if index is not None:
            index = checked(index, d_ff)
            owner, solution = _owned(index, solution, d_ff, wide)
        _apply_kernel[(cdiv(width, launch.columns), cdiv(d_model, launch.rows))](
            weight, master, residual, solution, index, owner, d_model, d_ff, width, n_edits,
            *weight.stride(), *strides(master, 2), *residual.stride(), *solution.stride(), *strides(index, 1),
            HAS_INDEX=index is not None, HAS_MASTER=master is not None, DTYPE=dtype_of(wide), ROWS=launch.rows,
            COLUMNS=launch.columns, EDITS=launch.edits, num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip


def _owned(index: Tensor, solution: Tensor, d_ff: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(d_ff,) int32 first position of each neuron, and the solution summed onto it, (k, n_edits) in `wide`."""
    width, n_edits = solution.shape
    owner = torch.full((d_ff,), width, dtype=torch.int32, device=index.device)
    copies = torch.zeros(d_ff, dtype=torch.int32, device=index.device)
    _owner_kernel[(cdiv(width, 256),)](index, owner, copies, width, d_ff, index.stride(0), BLOCK=256, num_warps=4)

    folded = torch.empty(width, n_edits, dtype=wide, device=index.device)
    # 16 positions by 64 edits: a solution row is read in runs of 256 bytes, and even 100 positions give 14 programs.
    if n_edits:
        _fold_kernel[(cdiv(width, 16), cdiv(n_edits, 64))](
            index, owner, copies, solution, folded, width, d_ff, n_edits, index.stride(0), *solution.stride(),
            DTYPE=dtype_of(wide), BLOCK=16, EDITS=64, num_warps=4,
        )  # fmt: skip
    return owner, folded
