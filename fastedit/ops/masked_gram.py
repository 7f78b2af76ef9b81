"""The system matrix of a closed-form update on selected neurons, A = weight * C[S, S] + H[S, S] + K_S^T K_S.

C is the second moment of background keys, H the history, K the keys, row per edit; S the selected neurons.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.ops._check import require, require_dtype, require_float, require_in_range, require_one_device
from fastedit.ops._dispatch import run

SYSTEM_DTYPES = (torch.float32, torch.float64)


def masked_gram(
    moment: Tensor,
    weight: float,
    keys: Tensor,
    history: Tensor | None = None,
    index: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A, (k, k) symmetric, in `dtype` (float32 or float64; sums and products are taken in it).

    moment: (d_ff, d_ff) float, the second moment C; weight: its factor lambda
    keys: (n_edits, d_ff) float; history: (d_ff, d_ff) float or None
    index: (k,) int64 ascending in [0, d_ff), or None for every neuron
    Raises ValueError for shapes and for tensors on several devices, TypeError for dtypes, IndexError for an index that
    is out of range.
    """
    args = MaskedGram(moment, weight, keys, history, index, dtype)
    check(args)
    return run("masked_gram", args)


class MaskedGram(NamedTuple):
    """The arguments of `masked_gram`, in its order."""

    moment: Tensor
    weight: float
    keys: Tensor
    history: Tensor | None = None
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index
    dtype: torch.dtype = torch.float64

    @property
    def width(self) -> int:
        """The number of neurons in the system: of the index, or all."""
        return self.keys.shape[1] if self.index is None else self.index.shape[0]


def check(args: MaskedGram) -> None:
    """Raise ValueError or TypeError for arguments that `masked_gram` does not take."""
    require_one_device("masked_gram", args)
    require("masked_gram", "keys", args.keys, (None, None))
    require_dtype("masked_gram", "keys", args.keys, *SYSTEM_DTYPES)
    check_dtype("masked_gram", args.dtype)

    d_ff = args.keys.shape[1]
    require("masked_gram", "moment", args.moment, (d_ff, d_ff))
    require_float("masked_gram", "moment", args.moment)
    if args.history is not None:
        require("masked_gram", "history", args.history, (d_ff, d_ff))
        require_float("masked_gram", "history", args.history)

    if args.index is not None:
        require("masked_gram", "index", args.index, (None,))
        require_dtype("masked_gram", "index", args.index, torch.int64)


def check_dtype(op: str, dtype: torch.dtype) -> None:
    """Raise TypeError for a dtype that a system matrix cannot have."""
    if dtype not in SYSTEM_DTYPES:
        raise TypeError(f"{op}: dtype must be torch.float32 or torch.float64, got {dtype}")


def masked_gram_ref(
    moment: Tensor,
    weight: float,
    keys: Tensor,
    history: Tensor | None = None,
    index: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The definition."""
    if index is not None:
        # Not by brackets, which count negative numbers from the end.
        moment = moment.index_select(0, index).index_select(1, index)
        keys = keys.index_select(1, index)
        history = None if history is None else history.index_select(0, index).index_select(1, index)

    gram = weight * moment.to(dtype)
    if history is not None:
        gram = gram + history.to(dtype)
    gram = gram + keys.to(dtype).T @ keys.to(dtype)

    # A product K^T K is symmetric only up to rounding.
    return gram.tril() + gram.tril(-1).T


def masked_gram_torch(args: MaskedGram) -> Tensor:
    """The definition is also the plain torch form."""
    if args.index is not None:
        require_in_range("masked_gram", "index", args.index, args.keys.shape[1])
    return masked_gram_ref(*args)
