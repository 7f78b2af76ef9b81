"""apply_delta of 100 edits on 30 % and 80 % of the columns: float32 and bf16 weights, bf16 with a float32 master.

Bytes: the memory lines of the selected columns of the weight read and written, likewise of the master (the weight is
then only written), residuals and solution read.  Operations: 2 per edit and element, 1 to add.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import SHARES, Cost, Setting, line_bytes, lines, setting, size_of
from torch import Tensor

from fastedit.ops.apply_delta import apply_delta
from fastedit.testing import Factory

# A sweep and the solves of the other layers run between two updates of a weight.
COLD = True


def sweep(models: list[str], device: str) -> list[Setting]:
    kinds = ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
    return [
        setting(model, f"k={share:.0%}{' master' if master else ''}", dtype, share=share, optional=master)
        for model in models
        for dtype, master in kinds
        for share in SHARES
    ]


def memory(at: Setting) -> int:
    """Bytes, at most, that inputs and one call need; the factory draws in float64."""
    return 6 * 8 * at.case.d_ff * at.case.d_model


def inputs(at: Setting, device: str) -> tuple[Any, ...]:
    return tuple(Factory(at.case, at.dtype, device).delta())


def call(given: tuple[Any, ...]) -> None:
    apply_delta(*given)


def added(given: tuple[Any, ...]) -> None:
    """The product, then index_add_ in the dtype of the weight or its master."""
    weight, residual, solution, index, master = given
    takes = weight if master is None else master
    takes.index_add_(1, index, (residual.T @ solution.T).to(takes.dtype))
    if master is not None:
        weight[:, index] = master[:, index].to(weight.dtype)


def copied(given: tuple[Any, ...]) -> None:
    """Gather, product added in place, scatter: the columns are read and written once each."""
    weight, residual, solution, index, master = given
    takes = weight if master is None else master
    columns = takes.index_select(1, index).float().addmm_(residual.T, solution.T)
    takes.index_copy_(1, index, columns.to(takes.dtype))
    if master is not None:
        weight.index_copy_(1, index, columns.to(weight.dtype))


PLAIN = {"torch: index_add": added, "torch: gather, scatter": copied}


def results(given: tuple[Any, ...], made: None) -> tuple[Tensor, ...]:
    return tuple(part[::16].clone() for part in (given[0], given[4]) if part is not None)


def cost(at: Setting, given: tuple[Any, ...], device: str) -> Cost:
    weight, residual, solution, index, master = given
    d_model, width = weight.shape
    line = line_bytes(device)

    def one_way(matrix: Tensor) -> int:
        return d_model * int(lines(index, width, matrix.element_size(), line)[-1:].sum()) * line

    columns = 2 * one_way(weight) if master is None else one_way(weight) + 2 * one_way(master)
    return Cost(columns + size_of(residual, solution, index), d_model * solution.shape[0] * (2 * residual.shape[0] + 1))
