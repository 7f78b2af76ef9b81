"""The chain of capture_keys, select_neurons and masked_gram in one cooperative launch, the host waiting for nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.ops import cuda
from fastedit.ops.cuda import capture_keys, masked_gram, select_neurons


class Buffers(NamedTuple):
    """What the launch leaves in device memory: keys and mass of `capture_keys`, neurons and status of
    `select_on_device`, and the packed matrix of `masked_gram_on_device`."""

    keys: Tensor
    mass: Tensor
    neurons: Tensor
    status: Tensor
    system: Tensor


def supports(
    gate: Tensor, up: Tensor | None, moment: Tensor, history: Tensor | None = None, past: Tensor | None = None
) -> str | None:
    """float32 moment, history and past keys; rows that can be read 16 bytes at a time."""
    reason = cuda.cannot(gate, up, dtypes=capture_keys.DTYPES) or cuda.cannot(moment, history, past)
    if reason is None and not all(_wide(rows) for rows in (gate, up) if rows is not None):
        return "the chain in one launch reads rows 16 bytes at a time, these are not aligned for it"
    return reason


def worth(
    gate: Tensor, up: Tensor | None, moment: Tensor, history: Tensor | None = None, past: Tensor | None = None
) -> str | None:
    """No GPU has timed it yet against the three launches."""
    return cuda.unmeasured()


def system_chain(
    gate: Tensor,
    up: Tensor | None,
    weights: Tensor,
    activation: str,
    active: Tensor | None,
    moment: Tensor,
    weight: float,
    history: Tensor | None,
    past: Tensor | None,
    reaching: float | None,
    within: float | None,
    dtype: torch.dtype,
) -> Buffers:
    """The arguments are those of the three ops; past: (n_past, d_ff) float32, more rows of keys, or None."""
    weights = weights.to(torch.float32)
    found = capture_keys.empty(gate)
    index, status = select_neurons.empty(found.mass)
    out = masked_gram.empty(found.keys, index, dtype)
    if gate.shape[2] == 0:
        return Buffers(*found, index, status.zero_(), out.view(-1))
    cuda.launch(
        "system_chain",
        gate,
        capture_keys.task(gate, up, weights, activation, active, found),
        select_neurons.task(found.mass, None, reaching, within, index, status),
        masked_gram.task(moment, weight, found.keys, history, index, out, status, past, active),
    )
    return Buffers(*found, index, status, out.view(-1))


def _wide(rows: Tensor) -> bool:
    aligned = rows.data_ptr() % 16 == 0 and rows.stride(2) == 1
    return aligned and all(stride * rows.element_size() % 16 == 0 for stride in rows.stride()[:2])
