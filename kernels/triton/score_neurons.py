"""Contribution scores on the device, score[i, j] = a[i, j] * <W[:, j], g[i]>. The definition is that of
`fastedit.ops.score_neurons`.

A tile of the product g W is scaled by the activations before it leaves the registers. With top_k it never leaves them:
a tile writes its best as 64-bit numbers with the score above and the neuron below, so that larger means better and no
two are equal. The best of a slot are then taken among the tiles' best. Half-precision products are exact, sums float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastedit.kernels._launch import INTERPRETED, cdiv, dtype_of, not_worth, on_device_of, tl, triton, unavailable

if TYPE_CHECKING:
    from fastedit.ops.score_neurons import ScoreNeurons


def supports(args: ScoreNeurons) -> str | None:
    """None, or why the kernel cannot take these arguments."""
    if args.top_k is not None and args.weight.dtype == torch.float64:
        return "a float64 score and its neuron do not fit the 64 bits by which the kernel compares them"
    return unavailable(args)


def worth(args: ScoreNeurons) -> str | None:
    """None, or why the kernel is not the faster choice."""
    return not_worth()


@dataclass(frozen=True)
class Config:
    """slots, neurons: sides of a tile; depth: elements of d_model multiplied at a time."""

    slots: int
    neurons: int
    depth: int
    num_warps: int
    num_stages: int


def config(n_slots: int, dtype: torch.dtype) -> Config:
    """The launch for this many slots and sums in `dtype`.

    slots       16, the least that the matrix units take, while W is read once or twice; 64 above 32 slots, where the
                products bound the time and W would be read again for every 16 slots
    neurons     64: 224 tiles over the 14336 neurons of an 8B model, more than its 132 multiprocessors
    depth       32: rows of 64 neurons leave memory in runs of 128 bytes and more; 12 KB of shared memory per stage;
                16 in float64, where 32 spill registers inside the loop
    num_stages  3: with one tile per multiprocessor the loads in flight must hide the latency of memory
    """
    return Config(16 if n_slots <= 32 else 64, 64, 16 if dtype == torch.float64 else 32, 4, 3)


@triton.jit
def _score_kernel(
    activations, weight, directions, out, best, n_slots, d_model, d_ff, n_best,
    a_slot, a_neuron, w_row, w_neuron, g_slot, g_row,
    TOP: tl.constexpr, DTYPE: tl.constexpr, WIDEN: tl.constexpr, SLOTS: tl.constexpr, NEURONS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """out = a * (g W), or the TOP best of every slot in this tile as (score in order << 32) + (2^32 - 1 - neuron)."""
    neuron = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)  # [NEURONS]
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)  # [SLOTS]
    neuron_there = (neuron < d_ff)[None, :]
    slot_there = (slot < n_slots)[:, None]
    slot64 = slot.to(tl.int64)

    total = tl.zeros((SLOTS, NEURONS), DTYPE)
    for base in range(0, d_model, DEPTH):
        row = base + tl.arange(0, DEPTH)  # [DEPTH]
        row_there = row < d_model
        g_place = slot64[:, None] * g_slot + row[None, :] * g_row
        g = tl.load(directions + g_place, mask=slot_there & row_there[None, :], other=0.0)
        w_place = row.to(tl.int64)[:, None] * w_row + neuron[None, :] * w_neuron
        w = tl.load(weight + w_place, mask=row_there[:, None] & neuron_there, other=0.0)
        if WIDEN:
            g = g.to(DTYPE)
            w = w.to(DTYPE)
        total = tl.dot(g, w, total, input_precision="ieee", out_dtype=DTYPE)

    there = slot_there & neuron_there
    a = tl.load(activations + slot64[:, None] * a_slot + neuron[None, :] * a_neuron, mask=there, other=0.0)
    score = total * a.to(DTYPE)

    if TOP == 0:
        tl.store(out + slot64[:, None] * d_ff + neuron[None, :], score, mask=there)
    else:
        # Both zeros are one score, and every NaN is the largest.
        bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
        order = tl.where(score != score, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)).to(tl.int64)
        lowest = -0x7FFFFFFFFFFFFFFF
        key = tl.where(there, order * 4294967296 + (4294967295 - neuron.to(tl.int64))[None, :], lowest)

        place = best + slot64 * n_best + tl.program_id(0) * TOP  # [SLOTS]
        for rank in range(TOP):
            largest = tl.max(key, 1)  # [SLOTS]
            tl.store(place + rank, largest, mask=slot < n_slots)
            key = tl.where(key == largest[:, None], lowest, key)


def score_neurons(args: ScoreNeurons) -> Tensor | tuple[Tensor, Tensor]:
    """Scores (n_slots, d_ff), or values and neurons (n_slots, k) of the best. Never waits for the device."""
    activations, weight, directions, top_k = args
    n_slots, d_ff = activations.shape
    wide = torch.promote_types(weight.dtype, torch.float32)
    # Triton's interpreter would multiply the bit patterns of bf16 numbers; the products are exact either way.
    widen = INTERPRETED and weight.dtype == torch.bfloat16
    launch = config(n_slots, wide)
    tiles = cdiv(d_ff, launch.neurons)
    top = min(top_k or 0, launch.neurons)

    # Either the scores or every tile's best are written; the other buffer is empty.
    out = torch.empty((n_slots, d_ff) if top_k is None else (0, d_ff), dtype=wide, device=weight.device)
    best = torch.empty(n_slots, tiles * top, dtype=torch.int64, device=weight.device)
    if n_slots and d_ff:
        with on_device_of(weight):
            _score_kernel[(tiles, cdiv(n_slots, launch.slots))](
                activations, weight, directions, out, best, n_slots, weight.shape[0], d_ff, tiles * top,
                *activations.stride(), *weight.stride(), *directions.stride(),
                TOP=top, DTYPE=dtype_of(wide), WIDEN=widen,
                SLOTS=launch.slots, NEURONS=launch.neurons, DEPTH=launch.depth, num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )  # fmt: skip
    if top_k is None:
        return out

    # No two keys are equal, so any way to take the largest takes the same ones.
    key = best.topk(top_k, dim=1).values
    order = key >> 32
    bits = torch.where(order < 0, order ^ 0x7FFFFFFF, order).to(torch.int32)
    return bits.view(torch.float32), 0xFFFFFFFF - (key & 0xFFFFFFFF)
