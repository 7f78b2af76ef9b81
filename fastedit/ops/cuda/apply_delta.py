"""The update in one pass over the selected columns: read, added to, rounded once, written."""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.ops import cuda

WIDE = (torch.float32, torch.float64)


def supports(
    weight: Tensor,
    residual: Tensor,
    solution: Tensor,
    index: Tensor | None,
    master: Tensor | None,
) -> str | None:
    """Any weight with a float32 master or none, a float64 one with a float64 master or none; any strides."""
    reason = (
        cuda.cannot(weight, dtypes=(*WIDE, torch.bfloat16, torch.float16))
        or cuda.cannot(residual, solution, master, dtypes=WIDE)
        or cuda.cannot(index, dtypes=(torch.int64,))
    )
    sums = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if reason is None and master is not None and master.dtype != sums:
        return f"the CUDA kernel takes a {sums} master of a {weight.dtype} weight, got {master.dtype}"
    return reason


def worth(
    weight: Tensor,
    residual: Tensor,
    solution: Tensor,
    index: Tensor | None,
    master: Tensor | None,
) -> str | None:
    """No GPU has timed it yet."""
    return cuda.unmeasured()


def apply_delta(
    weight: Tensor,
    residual: Tensor,
    solution: Tensor,
    index: Tensor | None,
    master: Tensor | None,
) -> None:
    """See :func:`fastedit.ops.apply_delta.apply_delta`; an ascending index is the fast case."""
    d_model, d_ff = weight.shape
    ascending = None if index is None else torch.empty(1, dtype=torch.int32, device=weight.device)
    cuda.launch(
        "apply_delta",
        weight,
        *(cuda.operand(value, 2) for value in (weight, master, residual, solution)),
        cuda.operand(index, 1),
        0 if ascending is None else ascending.data_ptr(),
        d_model,
        d_ff,
        d_ff if index is None else index.shape[0],
        residual.shape[0],
    )
