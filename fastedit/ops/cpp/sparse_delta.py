"""Changed columns sample by sample, and both gradients: only pairs of one sample are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastedit.ops import cpp
from fastedit.ops.sparse_delta import DELTA_DTYPES, HALF, DeltaGrads


def supports(activations: Tensor, *others: Any) -> str | None:
    """Every dtype of the op on the CPU; activations with gaps in their last dimension are copied first."""
    return cpp.cannot(activations, dtypes=(*DELTA_DTYPES, *HALF))


def worth(activations: Tensor, *others: Any) -> str | None:
    """Always. Two threads of an AMD EPYC (Zen 4), against a product per sample in torch: 5.8 times the sum for W
    (576, 1536) and 11 for (4096, 14336), 8.7 and 1.3 times the gradients."""
    return None


def sparse_delta(
    activations: Tensor, row_starts: Tensor, index: Tensor, slot_starts: Tensor, delta: Tensor, scale: float
) -> Tensor:
    """See :func:`fastedit.ops.sparse_delta.sparse_delta`."""
    y = delta.new_empty(activations.shape[0], delta.shape[1])
    _run(activations, row_starts, index, slot_starts, delta, scale, None, y, None, None)
    return y


def sparse_delta_grads(
    activations: Tensor,
    row_starts: Tensor,
    index: Tensor,
    slot_starts: Tensor,
    delta: Tensor,
    scale: float,
    grad: Tensor,
) -> DeltaGrads:
    """See :func:`fastedit.ops.sparse_delta.sparse_delta_grads`."""
    into = delta.new_zeros(activations.shape)
    into_delta = torch.empty_like(delta, memory_format=torch.contiguous_format)
    _run(activations, row_starts, index, slot_starts, delta, scale, grad, None, into, into_delta)
    return DeltaGrads(into.to(activations.dtype), into_delta)


def _run(
    activations: Tensor,
    row_starts: Tensor,
    index: Tensor,
    slot_starts: Tensor,
    delta: Tensor,
    scale: float,
    grad: Tensor | None,
    *results: Tensor | None,
) -> None:
    activations = cpp.rows(activations)
    inputs = [None if value is None else value.contiguous() for value in (row_starts, index, slot_starts, delta, grad)]
    cpp.compiled().sparse_delta(
        *cpp.setting(),
        *map(cpp.address, (activations, *inputs, *results)),
        row_starts.numel() - 1,
        activations.shape[0],
        index.numel(),
        activations.shape[1],
        delta.shape[1],
        activations.stride(0),
        float(scale),
        cpp.TYPES[activations.dtype],
        cpp.TYPES[delta.dtype],
        grad is None,
    )
