"""The Adam step with a block per row; everything is read once, except deltas whose norm is needed."""

from __future__ import annotations

import torch

from fastedit.ops import cuda
from fastedit.ops._check import apart
from fastedit.ops.sparse_adam import SparseAdam

DTYPES = (torch.float32, torch.float64)


def supports(args: SparseAdam) -> str | None:
    """float32 or float64 on a CUDA device, any strides."""
    return apart(args) or cuda.cannot(
        args.delta, args.grad, args.moment1, args.moment2, args.decay, args.radius, dtypes=DTYPES
    )


def worth(args: SparseAdam) -> str | None:
    """No GPU has timed it yet."""
    return cuda.unmeasured()


def sparse_adam(args: SparseAdam) -> None:
    """See :func:`fastedit.ops.sparse_adam.sparse_adam`."""
    settings = args.settings
    cuda.launch(
        "sparse_adam",
        args.delta,
        *(cuda.operand(value, 2) for value in (args.delta, args.grad, args.moment1, args.moment2)),
        *(cuda.operand(value, 1) for value in (args.decay, args.radius)),
        settings.lr,
        settings.beta1,
        settings.beta2,
        settings.eps,
        1 - settings.beta1**args.step,
        1 - settings.beta2**args.step,
        *args.delta.shape,
    )
