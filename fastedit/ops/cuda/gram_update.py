"""H += K^T K by the tiles of masked_gram: half of the products, H read once and written once."""

from __future__ import annotations

from torch import Tensor

from fastedit.ops import cuda
from fastedit.ops.cuda.masked_gram import DTYPES, add_gram


def supports(history: Tensor, keys: Tensor) -> str | None:
    """float32 or float64 on a CUDA device, any strides."""
    return cuda.cannot(history, keys, dtypes=DTYPES)


def worth(history: Tensor, keys: Tensor) -> str | None:
    """No GPU has timed it yet."""
    return cuda.unmeasured()


def gram_update(history: Tensor, keys: Tensor) -> None:
    """See :func:`fastedit.ops.gram_update.gram_update`."""
    add_gram(history, keys)
