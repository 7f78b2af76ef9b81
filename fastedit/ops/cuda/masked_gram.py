"""The system matrix, gathered on the fly: tiles of the lower triangle, each written twice, symmetric to the bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastedit.ops import cuda

DTYPES = (torch.float32, torch.float64)


def supports(
    moment: Tensor, weight: float, keys: Tensor, history: Tensor | None, index: Tensor | None, dtype: torch.dtype
) -> str | None:
    """Moment, history and keys of one dtype, float32 or float64, on a CUDA device, any strides."""
    reason = cuda.cannot(moment, keys, history, dtypes=DTYPES) or cuda.cannot(index, dtypes=(torch.int64,))
    if reason is None and any(value is not None and value.dtype != keys.dtype for value in (moment, history)):
        return "the CUDA kernel takes moment, keys and history of one dtype"
    return reason


def worth(
    moment: Tensor, weight: float, keys: Tensor, history: Tensor | None, index: Tensor | None, dtype: torch.dtype
) -> str | None:
    """No GPU has timed it yet."""
    return cuda.unmeasured()


def masked_gram(
    moment: Tensor, weight: float, keys: Tensor, history: Tensor | None, index: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See :func:`fastedit.ops.masked_gram.masked_gram`; sums are taken in `dtype`, in the order of the edits."""
    size = keys.shape[1] if index is None else index.shape[0]
    return masked_gram_on_device(moment, weight, keys, history, index, dtype).view(size, size)


def masked_gram_on_device(
    moment: Tensor,
    weight: float,
    keys: Tensor,
    history: Tensor | None,
    index: Tensor | None,
    dtype: torch.dtype,
    count: Tensor | None = None,
    past: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """The system matrix as a flat, packed buffer, A[i, j] at i * k + j, without waiting for the device.

    moment, weight, keys, history, index, dtype: as of the public op
    count: int64 in device memory whose first element is k, at most the length of index; None = all of index
    past: (n_past, d_ff), more rows of keys, same dtype; active: (n_edits,) bool, the rows of keys that count
    """
    out = empty(keys, index, dtype)
    cuda.launch("masked_gram", keys, task(moment, weight, keys, history, index, out, count, past, active))
    return out.view(-1)


def add_gram(history: Tensor, keys: Tensor) -> None:
    """H += K^T K in place: the same kernel with H as both the moment and the result."""
    given = task(history, 1.0, keys, None, None, history, None, None, None, packed=False)
    cuda.launch("masked_gram", keys, given)


def empty(keys: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Where the matrix goes, for as many neurons as there can be."""
    largest = keys.shape[1] if index is None else index.shape[0]
    return torch.empty(largest, largest, dtype=dtype, device=keys.device)


def task(
    moment: Tensor,
    weight: float,
    keys: Tensor,
    history: Tensor | None,
    index: Tensor | None,
    out: Tensor,
    count: Tensor | None,
    past: Tensor | None,
    active: Tensor | None,
    packed: bool = True,
) -> tuple[Any, ...]:
    """What the kernel is told; the tensors must live until it is enqueued."""
    n_edits, d_ff = keys.shape
    return (
        *(cuda.operand(value, 2) for value in (moment, keys, past, history, out)),
        cuda.operand(active, 1),
        cuda.operand(index, 1),
        0 if count is None else count.data_ptr(),
        weight,
        n_edits,
        0 if past is None else past.shape[0],
        d_ff,
        out.shape[0],
        packed,
    )
