"""Keys and mass in one pass over the rows, without atomics: equal inputs give equal bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.ops import cuda
from fastedit.ops._check import apart
from fastedit.ops.capture_keys import ACTIVATIONS, CaptureKeys, Keys

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(args: CaptureKeys) -> str | None:
    """float32, bf16 and fp16 on a CUDA device, any strides; 16-byte reads where the rows allow them."""
    return apart(args) or cuda.cannot(args.gate, args.up, dtypes=DTYPES)


def worth(args: CaptureKeys) -> str | None:
    """No GPU has timed it yet."""
    return cuda.unmeasured()


def capture_keys(args: CaptureKeys) -> Keys:
    """See :func:`fastedit.ops.capture_keys.capture_keys`."""
    args = ready(args)
    out = empty(args.gate)
    cuda.launch("capture_keys", args.gate, task(args, out))
    return out


def ready(args: CaptureKeys) -> CaptureKeys:
    """The arguments with weights and active as the kernel takes them; they must live until it is enqueued."""
    active = None if args.active is None else args.active.to(args.gate.device)
    return args._replace(weights=args.weights.to(torch.float32), active=active)


def empty(gate: Tensor) -> Keys:
    """Where keys and mass of these rows go."""
    n_edits, _, d_ff = gate.shape
    return Keys(gate.new_empty(n_edits, d_ff, dtype=torch.float32), gate.new_empty(d_ff, dtype=torch.float32))


def task(args: CaptureKeys, out: Keys) -> tuple[cuda.Argument, ...]:
    """The kernel's arguments; the tensors must live until it is enqueued."""
    return (
        cuda.operand(args.gate, 3),
        cuda.operand(args.up, 3),
        cuda.operand(args.weights, 1),
        cuda.operand(args.active, 1),
        out.keys.data_ptr(),
        out.mass.data_ptr(),
        *args.gate.shape,
        ACTIVATIONS.index(args.activation),
    )
