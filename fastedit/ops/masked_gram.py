"""The system matrix of a closed-form update on selected neurons, A = weight * C[S, S] + H[S, S] + K_S^T K_S.

C is the second moment of background keys, H the history, K the keys, row per edit; S the selected neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.ops import _dispatch
from fastedit.ops._check import require, require_dtype

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
    require("masked_gram", "keys", keys, (None, None))
    require_dtype("masked_gram", "keys", keys, *SYSTEM_DTYPES)
    if dtype not in SYSTEM_DTYPES:
        raise TypeError(f"masked_gram: dtype must be torch.float32 or torch.float64, got {dtype}")
    d_ff = keys.shape[1]
    require("masked_gram", "moment", moment, (d_ff, d_ff))
    if history is not None:
        require("masked_gram", "history", history, (d_ff, d_ff))
    if index is not None:
        require("masked_gram", "index", index, (None,))
        require_dtype("masked_gram", "index", index, torch.int64)
    return _dispatch.run("masked_gram", moment, weight, keys, history, index, dtype)


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
        moment, keys = moment[index][:, index], keys[:, index]
        history = None if history is None else history[index][:, index]
    gram = weight * moment.to(dtype)
    if history is not None:
        gram = gram + history.to(dtype)
    gram = gram + keys.to(dtype).T @ keys.to(dtype)
    # A product K^T K is symmetric only up to rounding.
    return gram.tril() + gram.tril(-1).T


masked_gram_torch = masked_gram_ref
