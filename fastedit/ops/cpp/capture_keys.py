"""Keys and mass in one pass over the rows; nothing of the size of gate is written."""

from __future__ import annotations

import torch

from fastedit.ops import cpp
from fastedit.ops.capture_keys import ACTIVATIONS, CaptureKeys, Keys

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(args: CaptureKeys) -> str | None:
    """float32, bf16 and fp16 on the CPU; rows whose last dimension has gaps are copied first."""
    return cpp.cannot(args.gate, args.up, dtypes=DTYPES)


def worth(args: CaptureKeys) -> str | None:
    """Always. Two threads of an AMD EPYC (Zen 4), 100 edits, 6 templates, float32, against the fastest of
    torch's forms: 2.3 times at d_ff 1536, 2.5 at 14336."""
    return None


def capture_keys(args: CaptureKeys) -> Keys:
    """See :func:`fastedit.ops.capture_keys.capture_keys`."""
    gate = cpp.rows(args.gate)
    up = None if args.up is None else cpp.rows(args.up)
    weights = args.weights.to(torch.float32).contiguous()
    active = None if args.active is None else args.active.to(gate.device).contiguous()

    keys = gate.new_empty(gate.shape[0], gate.shape[2], dtype=torch.float32)
    mass = keys.new_empty(gate.shape[2])
    cpp.compiled().capture_keys(
        *cpp.setting(),
        *map(cpp.address, (gate, up, weights, active, keys, mass)),
        *gate.shape,
        *gate.stride()[:2],
        *(gate if up is None else up).stride()[:2],
        cpp.TYPES[gate.dtype],
        ACTIVATIONS.index(args.activation),
    )
    return Keys(keys, mass)
