"""Keys and mass in one pass over the rows, without atomics: equal inputs give equal bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.ops import cuda
from fastedit.ops.capture_keys import ACTIVATIONS, Keys

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(gate: Tensor, up: Tensor | None, weights: Tensor, activation: str, active: Tensor | None) -> str | None:
    """float32, bf16 and fp16 on a CUDA device, any strides; 16-byte reads where the rows allow them."""
    return cuda.cannot(gate, up, dtypes=DTYPES)


def worth(gate: Tensor, up: Tensor | None, weights: Tensor, activation: str, active: Tensor | None) -> str | None:
    """No GPU has timed it yet."""
    return cuda.unmeasured()


def capture_keys(gate: Tensor, up: Tensor | None, weights: Tensor, activation: str, active: Tensor | None) -> Keys:
    """See :func:`fastedit.ops.capture_keys.capture_keys`."""
    weights = weights.to(torch.float32)
    active = None if active is None else active.to(gate.device)
    n_edits, n_templates, d_ff = gate.shape
    keys = gate.new_empty(n_edits, d_ff, dtype=torch.float32)
    mass = gate.new_empty(d_ff, dtype=torch.float32)
    cuda.launch(
        "capture_keys",
        gate,
        cuda.operand(gate, 3),
        cuda.operand(up, 3),
        cuda.operand(weights, 1),
        cuda.operand(active, 1),
        keys.data_ptr(),
        mass.data_ptr(),
        n_edits,
        n_templates,
        d_ff,
        ACTIVATIONS.index(activation),
    )
    return Keys(keys, mass)
