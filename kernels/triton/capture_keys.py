"""Keys and their mass on the device. The definition is that of `fastedit.ops.capture_keys`.

Memory bounds the time: gate and up are read once, in 16-byte pieces, and a key is written once. The mass is summed
over a few edits per program and then over the programs in a fixed order, without atomic additions: a run repeats bit
for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastedit.kernels._launch import cdiv, first, not_worth, on_device_of, strides, tl, triton, unavailable, wrong_dtype

if TYPE_CHECKING:
    from fastedit.ops.capture_keys import CaptureKeys

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(args: CaptureKeys) -> str | None:
    """None, or why the kernels cannot take these arguments."""
    return first(
        unavailable(args),
        wrong_dtype("gate", args.gate, *INPUT_DTYPES),
        wrong_dtype("weights", args.weights, torch.float32),
    )


def worth(args: CaptureKeys) -> str | None:
    """None, or why the kernels are not the faster choice."""
    return not_worth()


@dataclass(frozen=True)
class Config:
    """block: neurons of a program; edits: edits of a program; templates: number whose loads are in flight together."""

    block: int
    edits: int
    templates: int
    num_warps: int


def config(n_edits: int, n_templates: int, d_ff: int, element_size: int) -> Config:
    """The launch for these sizes.

    block         16 bytes per thread and load: 1024 halves or 512 floats on four warps
    edits         as many as leave 1056 programs, eight for each of the 132 multiprocessors; at most 16, so that the
                  partial masses are small beside the keys; one where there is less work than that
    templates     up to 8 loads of gate and up in flight per thread: 64 registers, room for two blocks and more
    """
    block = 1024 if element_size == 2 else 512
    columns = cdiv(d_ff, block)
    return Config(block, max(1, min(16, n_edits * columns // 1056)), min(n_templates, 8), 4)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """silu, relu, gelu, or gelu by tanh: 1 + tanh(y) = 2 / (1 + exp(-2 y))."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "relu":
        # A comparison, because a maximum would turn NaN into 0.
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _keys_kernel(
    gate, up, weights, active, keys, partial, n_edits, n_templates, d_ff,
    gate_edit, gate_template, gate_neuron, up_edit, up_template, up_neuron, weights_stride, active_stride,
    HAS_UP: tl.constexpr, HAS_ACTIVE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr, EDITS: tl.constexpr, TEMPLATES: tl.constexpr,
):  # fmt: skip
    """key_i = sum_t weight_t * activation(gate_it) * up_it;  partial = sum of |key_i| over the active edits here."""
    neuron = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = neuron < d_ff

    mass = tl.zeros((BLOCK,), tl.float32)
    start = tl.program_id(1) * EDITS
    for edit in range(start, tl.minimum(start + EDITS, n_edits)):
        row = tl.cast(edit, tl.int64)
        key = tl.zeros((BLOCK,), tl.float32)
        for base in range(0, n_templates, TEMPLATES):
            for offset in tl.static_range(TEMPLATES):
                template = base + offset
                there = inside & (template < n_templates)
                place = row * gate_edit + template * gate_template + neuron * gate_neuron  # [BLOCK]
                product = _activate(tl.load(gate + place, mask=there, other=0.0).to(tl.float32), ACTIVATION)
                if HAS_UP:
                    place = row * up_edit + template * up_template + neuron * up_neuron
                    product *= tl.load(up + place, mask=there, other=0.0).to(tl.float32)
                weight = tl.load(weights + template * weights_stride, mask=template < n_templates, other=0.0)
                key += weight * product

        tl.store(keys + row * d_ff + neuron, key, mask=inside)
        counted = tl.abs(key)
        if HAS_ACTIVE:
            counted = tl.where(tl.load(active + edit * active_stride) != 0, counted, 0.0)
        mass += counted

    tl.store(partial + tl.program_id(1) * d_ff + neuron, mass, mask=inside)


@triton.jit
def _sum_kernel(partial, mass, n_rows, d_ff, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """mass = sum of the rows of partial, always in the same order."""
    neuron = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros((BLOCK,), tl.float32)
    for base in range(0, n_rows, ROWS):
        row = base + tl.arange(0, ROWS)  # [ROWS]
        there = (row < n_rows)[:, None] & (neuron < d_ff)[None, :]
        total += tl.sum(tl.load(partial + row[:, None] * d_ff + neuron[None, :], mask=there, other=0.0), 0)
    tl.store(mass + neuron, total, mask=neuron < d_ff)


def capture_keys(args: CaptureKeys) -> tuple[Tensor, Tensor]:
    """(keys (n_edits, d_ff), mass (d_ff,)), float32. Never waits for the device."""
    gate, up, weights, activation, active = args
    n_edits, n_templates, d_ff = gate.shape
    keys = torch.empty(n_edits, d_ff, dtype=torch.float32, device=gate.device)
    if keys.numel() == 0:
        return keys, torch.zeros(d_ff, dtype=torch.float32, device=gate.device)
    if n_templates == 0:
        return keys.zero_(), torch.zeros(d_ff, dtype=torch.float32, device=gate.device)

    launch = config(n_edits, n_templates, d_ff, gate.element_size())
    groups = cdiv(n_edits, launch.edits)
    partial = torch.empty(groups, d_ff, dtype=torch.float32, device=gate.device)
    with on_device_of(gate):
        _keys_kernel[(cdiv(d_ff, launch.block), groups)](
            gate, up, weights, active, keys, partial, n_edits, n_templates, d_ff,
            *gate.stride(), *strides(up, 3), weights.stride(0), *strides(active, 1),
            HAS_UP=up is not None, HAS_ACTIVE=active is not None, ACTIVATION=activation,
            BLOCK=launch.block, EDITS=launch.edits, TEMPLATES=launch.templates, num_warps=launch.num_warps,
        )  # fmt: skip
        if groups == 1:
            return keys, partial[0]

        mass = torch.empty(d_ff, dtype=torch.float32, device=gate.device)
        # 64 neurons wide: even 4096 neurons give 64 programs; 16 rows of loads in flight hide the latency of L2.
        _sum_kernel[(cdiv(d_ff, 64),)](partial, mass, groups, d_ff, ROWS=16, BLOCK=64, num_warps=4)
    return keys, mass
