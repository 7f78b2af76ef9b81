"""masked_gram of 100 edits on 30 % and 80 % of the neurons, with history, summed in float64 (the engine's) and float32.

Bytes: the memory lines of the lower triangles of C[S, S] and H[S, S], the selected keys, and the whole result.
Operations: per pair of neurons of the lower triangle 2 per edit, 1 for lambda, 1 for H.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import SHARES, Cost, Setting, line_bytes, lines, setting
from torch import Tensor

from fastedit.ops.masked_gram import masked_gram
from fastedit.testing import Factory

# Every layer has its own C and H, hundreds of megabytes each.
COLD = True


def sweep(models: list[str], device: str) -> list[Setting]:
    return [
        setting(model, f"k={share:.0%}", dtype, share=share)
        for model in models
        for dtype in (torch.float64, torch.float32)
        for share in SHARES
    ]


def memory(at: Setting) -> int:
    """Bytes, at most, that inputs and one call need: C, H, and in the reference five (k, k) of the result's dtype."""
    wide = 8 if at.dtype == torch.float64 else 4
    return 3 * 4 * at.case.d_ff**2 + 5 * wide * (at.case.selected or at.case.d_ff) ** 2


def inputs(at: Setting, device: str) -> tuple[Any, ...]:
    return (*Factory(at.case, torch.float32, device).gram(), at.dtype)


def call(given: tuple[Any, ...]) -> Tensor:
    return masked_gram(*given)


def gathered(given: tuple[Any, ...]) -> Tensor:
    """Rows, then columns; sums in place; symmetric only up to rounding, which a Cholesky factor does not see."""
    moment, weight, keys, history, index, dtype = given
    system = moment.index_select(0, index).index_select(1, index).to(dtype)
    keys = keys.index_select(1, index).to(dtype)
    if history is None:
        return system.addmm_(keys.T, keys, beta=weight)
    system.mul_(weight).add_(history.index_select(0, index).index_select(1, index))
    return system.addmm_(keys.T, keys)


def at_once(given: tuple[Any, ...]) -> Tensor:
    """Both indices in one gather, which never holds the whole rows."""
    moment, weight, keys, history, index, dtype = given
    place = index[:, None], index[None, :]
    system = moment[place].to(dtype).mul_(weight)
    keys = keys.index_select(1, index).to(dtype)
    if history is not None:
        system.add_(history[place])
    return system.addmm_(keys.T, keys)


PLAIN = {"torch: rows, columns": gathered, "torch: one gather": at_once}


def results(given: tuple[Any, ...], made: Tensor) -> tuple[Tensor, ...]:
    # A few rows stand for all: copies of the whole matrix would need as much memory as the op.
    rows = torch.linspace(0, made.shape[0] - 1, min(64, made.shape[0]), device=made.device).long()
    return (made[rows], made.diagonal().clone())


def cost(at: Setting, given: tuple[Any, ...], device: str) -> Cost:
    moment, _, keys, history, index, dtype = given
    n_edits, width = keys.shape
    k = width if index is None else len(index)
    wide = 8 if dtype == torch.float64 else 4
    line = line_bytes(device)
    # Row i of the lower triangle ends at its own column.
    triangle = int(lines(index, width, moment.element_size(), line).sum()) * line
    sources = 1 if history is None else 2
    chosen = n_edits * int(lines(index, width, keys.element_size(), line)[-1:].sum()) * line
    pairs = k * (k + 1) // 2
    return Cost(sources * triangle + chosen + wide * k * k, pairs * (2 * n_edits + sources), dtype)
