"""The system matrix; half of its tiles are computed, and C and H are gathered on the fly."""

from __future__ import annotations

from torch import Tensor

from fastedit.ops import cpp
from fastedit.ops.masked_gram import SYSTEM_DTYPES, MaskedGram


def supports(args: MaskedGram) -> str | None:
    """float32 and float64 on the CPU; C and H are copied first where their last dimension has gaps."""
    return cpp.cannot(args.moment, args.keys, args.history, dtypes=SYSTEM_DTYPES)


def worth(args: MaskedGram) -> str | None:
    """Always. Two threads of an AMD EPYC (Zen 4), 100 edits, against the fastest of torch's forms, in float64: 1.7
    times at d_ff 1536 and 30 %, 2.1 at 80 %; 4.3 and 5.1 at 14336. In float32: 1.8 and 1.8, 4.3 and 5.0."""
    return None


def masked_gram(args: MaskedGram) -> Tensor:
    """See :func:`fastedit.ops.masked_gram.masked_gram`. Raises IndexError for an index outside of [0, d_ff)."""
    keys, dtype, width = args.keys, args.dtype, args.width
    moment = cpp.rows(args.moment)
    history = None if args.history is None else cpp.rows(args.history)
    index = None if args.index is None else args.index.contiguous()

    out = keys.new_empty(width, width, dtype=dtype)
    # Without a history the kernel still wants its stride and type.
    other = moment if history is None else history
    cpp.compiled().masked_gram(
        *cpp.setting(),
        *map(cpp.address, (moment, history, keys, index, out)),
        float(args.weight),
        keys.shape[0],
        width,
        moment.stride(0),
        other.stride(0),
        *keys.stride(),
        *(cpp.TYPES[kind] for kind in (moment.dtype, other.dtype, keys.dtype, dtype)),
        keys.shape[1],
    )
    return out
