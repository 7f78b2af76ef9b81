"""The update in one pass over the selected columns: read, added to, rounded once, written."""

from __future__ import annotations

import torch

from fastedit.ops import cuda
from fastedit.ops._check import apart
from fastedit.ops.apply_delta import WEIGHT_DTYPES, ApplyDelta

WIDE = (torch.float32, torch.float64)


def supports(args: ApplyDelta) -> str | None:
    """Any weight with a float32 master or none, a float64 one with a float64 master or none; any strides."""
    weight, master = args.weight, args.master
    reason = (
        apart(args)
        or cuda.cannot(weight, dtypes=WEIGHT_DTYPES)
        or cuda.cannot(args.residual, args.solution, master, dtypes=WIDE)
        or cuda.cannot(args.index, dtypes=(torch.int64,))
    )
    sums = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if reason is None and master is not None and master.dtype != sums:
        return f"the CUDA kernel takes a {sums} master of a {weight.dtype} weight, got {master.dtype}"
    return reason


def worth(args: ApplyDelta) -> str | None:
    """No GPU has timed it yet."""
    return cuda.unmeasured()


def apply_delta(args: ApplyDelta) -> None:
    """See :func:`fastedit.ops.apply_delta.apply_delta`; an ascending index is the fast case."""
    weight, residual, solution, index, master = args
    d_model, d_ff = weight.shape
    # Scratch for the kernel's answer whether the index ascends.
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
