"""The Adam step with a block per row: everything is read once, but for the deltas whose norm is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.ops import cuda
from fastedit.ops.sparse_adam import AdamSettings

DTYPES = (torch.float32, torch.float64)


def supports(
    delta: Tensor,
    grad: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    step: int,
    settings: AdamSettings,
    decay: Tensor | None,
    radius: Tensor | None,
) -> str | None:
    """float32 or float64 on a CUDA device, any strides."""
    return cuda.cannot(delta, grad, moment1, moment2, decay, radius, dtypes=DTYPES)


def worth(
    delta: Tensor,
    grad: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    step: int,
    settings: AdamSettings,
    decay: Tensor | None,
    radius: Tensor | None,
) -> str | None:
    """No GPU has timed it yet."""
    return cuda.unmeasured()


def sparse_adam(
    delta: Tensor,
    grad: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    step: int,
    settings: AdamSettings,
    decay: Tensor | None,
    radius: Tensor | None,
) -> None:
    """See :func:`fastedit.ops.sparse_adam.sparse_adam`."""
    cuda.launch(
        "sparse_adam",
        delta,
        *(cuda.operand(value, 2) for value in (delta, grad, moment1, moment2)),
        *(cuda.operand(value, 1) for value in (decay, radius)),
        settings.lr,
        settings.beta1,
        settings.beta2,
        settings.eps,
        1 - settings.beta1**step,
        1 - settings.beta2**step,
        *delta.shape,
    )
