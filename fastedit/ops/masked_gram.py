"""The system matrix of a closed-form update on selected neurons, A = weight * C[S, S] + H[S, S] + K_S^T K_S.

C is the second moment of background keys, H the history, K the keys, row per edit; S the selected neurons.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.ops._check import require, require_dtype
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
    index: (k,) int64 ascending, or None for every neuron
    Raises ValueError for shapes, TypeError for dtypes.
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
    require("masked_gram", "keys", args.keys, (None, None))
    require_dtype("masked_gram", "keys", args.keys, *SYSTEM_DTYPES)
    if args.dtype not in SYSTEM_DTYPES:
        raise TypeError(f"masked_gram: dtype must be torch.float32 or torch.float64, got {args.dtype}")

    d_ff = args.keys.shape[1]
    require("masked_gram", "moment", args.moment, (d_ff, d_ff))
    if args.history is not None:
        require("masked_gram", "history", args.history, (d_ff, d_ff))

    if args.index is not None:
        require("masked_gram", "index", args.index, (None,))
        require_dtype("masked_gram", "index", args.index, torch.int64)


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
        moment = moment[index][:, index]
        keys = keys[:, index]
        history = None if history is None else history[index][:, index]

    gram = weight * moment.to(dtype)
    if history is not None:
        gram = gram + history.to(dtype)
    gram = gram + keys.to(dtype).T @ keys.to(dtype)

    # A product K^T K is symmetric only up to rounding.
    return gram.tril() + gram.tril(-1).T


def masked_gram_torch(args: MaskedGram) -> Tensor:
    """The definition is also the plain torch form."""
    return masked_gram_ref(*args)
