"""H += K^T K by the tiles of masked_gram: half of the products, H read once and written once."""

from __future__ import annotations

from fastedit.ops import cuda
from fastedit.ops._check import apart
from fastedit.ops.cuda import masked_gram
from fastedit.ops.gram_update import GramUpdate
from fastedit.ops.masked_gram import SYSTEM_DTYPES, MaskedGram


def supports(args: GramUpdate) -> str | None:
    """float32 or float64 on a CUDA device, any strides."""
    return apart(args) or cuda.cannot(args.history, args.keys, dtypes=SYSTEM_DTYPES)


def worth(args: GramUpdate) -> str | None:
    """No GPU has timed it yet."""
    return cuda.unmeasured()


def gram_update(args: GramUpdate) -> None:
    """See :func:`fastedit.ops.gram_update.gram_update`. H is both the moment, with lambda 1, and the result."""
    history, keys = args
    system = MaskedGram(history, 1.0, keys)
    cuda.launch("masked_gram", keys, masked_gram.task(system, out=history, packed=False))
