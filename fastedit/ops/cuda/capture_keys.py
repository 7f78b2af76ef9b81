"""Keys and mass in one pass over the rows, without atomics: equal inputs give equal bits."""

from __future__ import annotations

from typing import Any

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
    found = empty(gate)
    cuda.launch("capture_keys", gate, task(gate, up, weights, activation, active, found))
    return found


def empty(gate: Tensor) -> Keys:
    """Where keys and mass of these rows go."""
    n_edits, _, d_ff = gate.shape
    return Keys(gate.new_empty(n_edits, d_ff, dtype=torch.float32), gate.new_empty(d_ff, dtype=torch.float32))


def task(
    gate: Tensor, up: Tensor | None, weights: Tensor, activation: str, active: Tensor | None, found: Keys
) -> tuple[Any, ...]:
    """What the kernel is told; the tensors must live until it is enqueued."""
    return (
        cuda.operand(gate, 3),
        cuda.operand(up, 3),
        cuda.operand(weights, 1),
        cuda.operand(active, 1),
        found.keys.data_ptr(),
        found.mass.data_ptr(),
        *gate.shape,
        ACTIVATIONS.index(activation),
    )
