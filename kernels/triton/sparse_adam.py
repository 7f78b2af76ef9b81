"""One Adam step over the rows of (n, d) deltas on the device. The definition is that of `fastedit.ops.sparse_adam`.

One program per row computes the row's norm (for the penalty), then the step and the new norm in one pass, and scales
the row once more only where the new norm is past the bound. The later passes read the row from the caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastedit.kernels._launch import dtype_of, not_worth, on_device_of, power_of_two, strides, tl, triton, unavailable

if TYPE_CHECKING:
    from fastedit.ops.sparse_adam import SparseAdam


def supports(args: SparseAdam) -> str | None:
    """None, or why the kernel cannot take these arguments."""
    return unavailable(args)


def worth(args: SparseAdam) -> str | None:
    """None, or why the kernel is not the faster choice."""
    return not_worth()


@dataclass(frozen=True)
class Config:
    """block: elements of a row in registers at a time."""

    block: int
    num_warps: int


def config(d: int) -> Config:
    """The launch for rows of d elements.

    block      a row up to 4096 in one piece (d_model of an 8B model), longer ones in pieces of 4096
    num_warps  16 elements of each of four arrays per thread, two float64 registers each at most: 128 registers
    """
    block = power_of_two(d, 32, 4096)
    return Config(block, max(1, block // 512))


@triton.jit
def _length(square, wide, DTYPE: tl.constexpr):
    """The root of a sum of squares; where they vanish or overflow in DTYPE, of the sum in float64."""
    inside = (square > 1e-30) & (square < 1e36)
    return tl.where(inside, tl.sqrt(square), tl.sqrt(wide).to(DTYPE))


@triton.jit
def _root(v, bias, DTYPE: tl.constexpr):
    """sqrt(v / bias). The quotient of a large moment by a small bias overflows though its root does not: by 2^-64."""
    down = tl.where(v > 1.0, 5.421010862427522e-20, 1.0).to(DTYPE)
    up = tl.where(v > 1.0, 4294967296.0, 1.0).to(DTYPE)
    return tl.sqrt(v * down / bias) * up


@triton.jit
def _adam_kernel(
    delta, grad, moment1, moment2, decay, radius, d,
    lr: tl.float64, beta1: tl.float64, beta2: tl.float64, rest1: tl.float64, rest2: tl.float64, eps: tl.float64,
    unbias1: tl.float64, unbias2: tl.float64,
    delta_row, delta_column, grad_row, grad_column, moment1_row, moment1_column, moment2_row, moment2_column,
    decay_stride, radius_stride,
    HAS_DECAY: tl.constexpr, HAS_RADIUS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g = grad + decay x / ||x||; m, v; x -= lr (m / unbias1) / (sqrt(v / unbias2) + eps); x *= min(1, r / ||x||)."""
    row = tl.program_id(0).to(tl.int64)
    pull = tl.full((), 0.0, DTYPE)
    lift = tl.full((), 1.0, DTYPE)
    if HAS_DECAY:
        square = tl.full((), 0.0, DTYPE)
        wide = tl.full((), 0.0, tl.float64)
        for base in range(0, d, BLOCK):
            column = base + tl.arange(0, BLOCK)  # [BLOCK]
            x = tl.load(delta + row * delta_row + column * delta_column, mask=column < d, other=0.0)
            square += tl.sum(x * x, 0)
            wide += tl.sum(x.to(tl.float64) * x.to(tl.float64), 0)
        norm = _length(square, wide, DTYPE)
        # A decay over a norm below 1e-38 would overflow: a power of two is moved from the row to it.
        lift = tl.where(norm < 5.421010862427522e-20, 18446744073709551616.0, lift)
        # Not a division by a chosen 1 where the norm is 0: a NaN norm must come through.
        pull = tl.where(norm == 0.0, 0.0, tl.load(decay + row * decay_stride) / (norm * lift))

    square = tl.full((), 0.0, DTYPE)
    wide = tl.full((), 0.0, tl.float64)
    for base in range(0, d, BLOCK):
        column = base + tl.arange(0, BLOCK)  # [BLOCK]
        inside = column < d
        x_place = delta + row * delta_row + column * delta_column
        m_place = moment1 + row * moment1_row + column * moment1_column
        v_place = moment2 + row * moment2_row + column * moment2_column

        x = tl.load(x_place, mask=inside, other=0.0)
        g = tl.load(grad + row * grad_row + column * grad_column, mask=inside, other=0.0) + pull * (x * lift)
        m = tl.full((), beta1, DTYPE) * tl.load(m_place, mask=inside, other=0.0) + tl.full((), rest1, DTYPE) * g
        v = tl.full((), beta2, DTYPE) * tl.load(v_place, mask=inside, other=0.0) + tl.full((), rest2, DTYPE) * g * g
        denominator = _root(v, tl.full((), unbias2, DTYPE), DTYPE) + tl.full((), eps, DTYPE)
        step = tl.full((), lr, DTYPE) * (m / tl.full((), unbias1, DTYPE)) / denominator

        # Past the end the denominator is eps, which may be 0.
        x = tl.where(inside, x - step, 0.0)
        tl.store(x_place, x, mask=inside)
        tl.store(m_place, m, mask=inside)
        tl.store(v_place, v, mask=inside)
        square += tl.sum(x * x, 0)
        wide += tl.sum(x.to(tl.float64) * x.to(tl.float64), 0)

    if HAS_RADIUS:
        norm = _length(square, wide, DTYPE)
        bound = tl.load(radius + row * radius_stride)
        if norm > bound:
            # Other threads of this program may have written what is read here.
            tl.debug_barrier()
            for base in range(0, d, BLOCK):
                column = base + tl.arange(0, BLOCK)  # [BLOCK]
                x_place = delta + row * delta_row + column * delta_column
                x = tl.load(x_place, mask=column < d, other=0.0)
                tl.store(x_place, x * (bound / norm), mask=column < d)


def sparse_adam(args: SparseAdam) -> None:
    """The step in place."""
    delta, grad, moment1, moment2, step, settings, decay, radius = args
    n, d = delta.shape
    if delta.numel() == 0:
        return

    launch = config(d)
    beta1, beta2 = settings.beta1, settings.beta2
    with on_device_of(delta):
        _adam_kernel[(n,)](
            delta, grad, moment1, moment2, decay, radius, d,
            float(settings.lr), float(beta1), float(beta2), 1.0 - beta1, 1.0 - beta2, float(settings.eps),
            1.0 - beta1**step, 1.0 - beta2**step,
            *delta.stride(), *grad.stride(), *moment1.stride(), *moment2.stride(),
            *strides(decay, 1), *strides(radius, 1),
            HAS_DECAY=decay is not None, HAS_RADIUS=radius is not None, DTYPE=dtype_of(delta.dtype),
            BLOCK=launch.block, num_warps=launch.num_warps,
        )  # fmt: skip
