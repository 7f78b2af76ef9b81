"""Exact neuron selection on the device, without a sort. The rules are those of `fastedit.ops.select_neurons`.

One program holds every score in registers as a 32-bit key that sorts like the score. It finds the last key of the
prefix bit by bit from the top, by 32 counts (or float64 sums) over the keys not below a candidate. A sum in a fixed
order never falls when a score is added, rounding included, so the search is exact for the sums it takes, and it
repeats bit for bit. Among equal scores the smallest index comes first. The indices and their number stay on the
device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastedit.kernels._launch import first, not_worth, on_device_of, power_of_two, tl, triton, unavailable, wrong_dtype

if TYPE_CHECKING:
    from fastedit.ops.select_neurons import SelectNeurons

SCORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 65536


def supports(args: SelectNeurons) -> str | None:
    """None, or why the kernel cannot take these arguments."""
    return first(
        unavailable(args),
        wrong_dtype("score", args.score, *SCORE_DTYPES),
        too_many(args.score.numel()),
    )


def too_many(n_scores: int) -> str | None:
    """None, or why the one program of the kernel cannot hold so many scores."""
    return None if n_scores <= LARGEST else f"{n_scores} scores do not fit one program, at most {LARGEST}"


def worth(args: SelectNeurons) -> str | None:
    """None, or why the kernel is not the faster choice."""
    return not_worth()


@dataclass(frozen=True)
class Config:
    """block: scores of the program, all of them."""

    block: int
    num_warps: int


def config(n_scores: int) -> Config:
    """The launch for this many scores.

    num_warps   512 scores on each warp, 16 keys per thread; above 16384 scores there are 32 warps and a thread holds 32
                keys (64 above 32768, which no longer fit its 64 registers)
    """
    block = power_of_two(n_scores, 32, LARGEST)
    return Config(block, max(1, min(32, block // 512)))


@triton.jit
def _mass(key, smallest):
    """Summed score, float64, of the keys not below `smallest`; here keys are the bits of the scores.

    Only keys stay in registers: a score is widened after the comparison, not once for all before the search."""
    bits = tl.where(key >= smallest, key, 0)
    return tl.sum(bits.to(tl.float32, bitcast=True).to(tl.float64), 0)


@triton.jit
def _last_key(key, top_k, bound, RULE: tl.constexpr):
    """The smallest key that may be selected: the largest one down to which the keys are enough."""
    last = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = last | bit
        if RULE == "top_k":
            enough = tl.sum((key >= candidate).to(tl.int32), 0) >= top_k
        elif RULE == "reaching":
            enough = _mass(key, candidate) >= bound
        else:
            enough = _mass(key, candidate) > bound
        last = tl.where(enough, candidate, last)
        bit = bit >> 1
    if RULE == "reaching":
        # Where there is no mass at all, every candidate reaches it.
        last = tl.minimum(last, tl.max(key, 0))
    return last


@triton.jit
def _select_kernel(
    score, index, status, n, score_stride, top_k, share: tl.float64, RULE: tl.constexpr, BLOCK: tl.constexpr
):
    """index = the selected neurons, ascending; status = their count, the scores not finite, the negative ones."""
    neuron = tl.arange(0, BLOCK)  # [BLOCK]
    inside = neuron < n
    value = tl.load(score + neuron * score_stride, mask=inside, other=0.0).to(tl.float32)
    # Both zeros are one score.
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)
    negative = (bits & 0x80000000) != 0
    tl.store(status + 1, tl.sum((inside & ((bits & 0x7F800000) == 0x7F800000)).to(tl.int64), 0))
    tl.store(status + 2, tl.sum((inside & negative).to(tl.int64), 0))

    # Unsigned numbers in the order of the scores. The padding's 0 is below every top-k key and adds no mass.
    key = bits
    bound = 0.0
    if RULE == "top_k":
        key = tl.where(inside, tl.where(negative, bits ^ 0xFFFFFFFF, bits | 0x80000000), 0)
    else:
        bound = _mass(key, 0) * share

    last = _last_key(key, top_k, bound, RULE)
    over = key > last
    tied = inside & (key == last)
    n_over = tl.sum(over.to(tl.int32), 0)
    rank = tl.cumsum(tied.to(tl.int32), 0)  # [BLOCK] from 1 in index order

    if RULE == "top_k":
        taken = rank <= top_k - n_over
    else:
        above = _mass(key, last + 1)
        tie = last.to(tl.float32, bitcast=True).to(tl.float64)
        if RULE == "reaching":
            taken = (rank == 1) | (above + tie * (rank - 1) < bound)
        else:
            taken = (above + tie * rank <= bound) | ((rank == 1) & (n_over == 0))

    chosen = inside & (over | (tied & taken))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(index + place, neuron.to(tl.int64), mask=chosen)
    tl.store(status, tl.sum(chosen.to(tl.int64), 0))


def select_neurons(args: SelectNeurons) -> Tensor:
    """(n_selected,) int64 ascending. Waits for the number of neurons."""
    index, status = select_on_device(args)
    return index[: int(status[0])]


def select_on_device(args: SelectNeurons) -> tuple[Tensor, Tensor]:
    """(index (d_ff,) int64, status (3,) int64) in device memory, without waiting for the device.

    The first status[0] of index are the selected neurons; status[1] counts NaN and Inf scores, status[2] negative
    ones. Where status[1], or with a share of the mass status[2], is not 0, index and status[0] mean nothing."""
    score, top_k, reaching, _ = args
    n, share = score.shape[0], args.share
    rule = "within" if reaching is None else "reaching"
    if share is None:
        rule = "top_k"
    elif share >= 1:
        rule, top_k = "top_k", n

    index = torch.empty(n, dtype=torch.int64, device=score.device)
    status = torch.empty(3, dtype=torch.int64, device=score.device)
    launch = config(n)
    with on_device_of(score):
        _select_kernel[(1,)](
            score, index, status, n, score.stride(0), top_k or 0, share or 0.0,
            RULE=rule, BLOCK=launch.block, num_warps=launch.num_warps,
        )  # fmt: skip
    return index, status
