"""The system matrix, gathered on the fly: tiles of the lower triangle, each written twice, symmetric to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.ops import cuda
from fastedit.ops._check import apart
from fastedit.ops.masked_gram import SYSTEM_DTYPES, MaskedGram


def supports(args: MaskedGram) -> str | None:
    """Moment, history and keys of one dtype, float32 or float64, on a CUDA device, any strides."""
    moment, keys, history = args.moment, args.keys, args.history
    reason = (
        apart(args)
        or cuda.cannot(moment, keys, history, dtypes=SYSTEM_DTYPES)
        or cuda.cannot(args.index, dtypes=(torch.int64,))
    )
    if reason is None and any(value is not None and value.dtype != keys.dtype for value in (moment, history)):
        return "the CUDA kernel takes moment, keys and history of one dtype"
    return reason


def worth(args: MaskedGram) -> str | None:
    """No GPU has timed it yet."""
    return cuda.unmeasured()


def masked_gram(args: MaskedGram) -> Tensor:
    """See :func:`fastedit.ops.masked_gram.masked_gram`; sums are taken in the order of the edits."""
    return masked_gram_on_device(args).view(args.width, args.width)


def masked_gram_on_device(
    args: MaskedGram, count: Tensor | None = None, past: Tensor | None = None, active: Tensor | None = None
) -> Tensor:
    """The system matrix as a flat, packed buffer, A[i, j] at i * k + j, without waiting for the device.

    count: int64 in device memory whose first element is k, at most the length of the index; None = all of the index
    past: (n_past, d_ff), more rows of keys, same dtype; active: (n_edits,) bool, the rows of keys that count
    """
    out = empty(args)
    cuda.launch("masked_gram", args.keys, task(args, out, count, past, active))
    return out.view(-1)


def empty(args: MaskedGram) -> Tensor:
    """Where the matrix goes, for as many neurons as there can be."""
    return torch.empty(args.width, args.width, dtype=args.dtype, device=args.keys.device)


def task(
    args: MaskedGram,
    out: Tensor,
    count: Tensor | None = None,
    past: Tensor | None = None,
    active: Tensor | None = None,
    packed: bool = True,
) -> tuple[cuda.Argument, ...]:
    """The kernel's arguments; the tensors must live until it is enqueued."""
    n_edits, d_ff = args.keys.shape
    return (
        *(cuda.operand(value, 2) for value in (args.moment, args.keys, past, args.history, out)),
        cuda.operand(active, 1),
        cuda.operand(args.index, 1),
        0 if count is None else count.data_ptr(),
        args.weight,
        n_edits,
        0 if past is None else past.shape[0],
        d_ff,
        out.shape[0],
        packed,
    )
