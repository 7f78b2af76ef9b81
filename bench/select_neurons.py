"""select_neurons on heavy-tailed scores: 30 % and 80 % of the neurons by rank, and the prefix that reaches a mass.

Bytes: the scores read once, the indices written.  Operations: a comparison per score.  Both are so few that the roof
is microseconds: the time shows the number of passes and launches.  Torch's forms keep the op's promises (exact among
equals, NaN and Inf refused); torch without them is the yardstick.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from measure import SHARES, Cost, Setting, setting, size_of
from torch import Tensor

from fastedit.ops.select_neurons import select_neurons
from fastedit.testing import Factory

# capture_keys has just written the scores.
COLD = False
MASSES = (0.8, 0.95)


def sweep(models: list[str], device: str) -> list[Setting]:
    settings = []
    for model in models:
        settings += [setting(model, f"k={share:.0%}", options={"share": share}) for share in SHARES]
        settings += [setting(model, f"mass={mass:.0%}", options={"reaching": mass}) for mass in MASSES]
    return settings


def memory(at: Setting) -> int:
    """Bytes, at most, that inputs and one call need."""
    return 100 * at.case.d_ff


def inputs(at: Setting, device: str) -> tuple[Any, ...]:
    rule = dict(at.options or {})
    if "share" in rule:
        rule = {"top_k": round(rule["share"] * at.case.d_ff)}
    return Factory(at.case, at.dtype, device).score(), rule


def call(given: tuple[Any, ...]) -> Tensor:
    return select_neurons(given[0], **given[1])


def check(score: Tensor, rule: dict[str, Any]) -> None:
    """What the op refuses, in one pass: a NaN is the least and the greatest of all."""
    least, greatest = (float(end) for end in score.aminmax())
    if not (math.isfinite(least) and math.isfinite(greatest) and (least >= 0 or "top_k" in rule)):
        raise ValueError(f"scores from {least} to {greatest}")


def reaching(ordered: Tensor, share: float) -> int:
    """Length of the smallest prefix that reaches the share."""
    reached = ordered.cumsum(0, dtype=torch.float64)
    return int(torch.searchsorted(reached, share * reached[-1:])) + 1


def by_sort(given: tuple[Any, ...]) -> Tensor:
    """A stable sort, the prefix sorted again."""
    score, rule = given
    check(score, rule)
    ordered, order = score.sort(descending=True, stable=True)
    count = rule["top_k"] if "top_k" in rule else reaching(ordered, rule["reaching"])
    return order[:count].sort().values


def by_bound(given: tuple[Any, ...]) -> Tensor:
    """The score of the last neuron taken, by a partial sort for a rank; all above it and the first of its equals."""
    score, rule = given
    check(score, rule)
    if "top_k" in rule:
        count = rule["top_k"]
        last = score.topk(count, sorted=False).values.min()
    else:
        ordered = score.sort(descending=True).values
        count = reaching(ordered, rule["reaching"])
        last = ordered[count - 1]
    above = score > last
    tied = score == last
    return (above | (tied & (tied.cumsum(0) <= count - above.sum()))).nonzero().flatten()


def loose(given: tuple[Any, ...]) -> Tensor:
    """Torch's partial sort for a rank, its unstable sort for a mass: any of the equals, NaN and Inf unseen."""
    score, rule = given
    if "top_k" in rule:
        return score.topk(rule["top_k"], sorted=False).indices.sort().values
    ordered, order = score.sort(descending=True)
    return order[: reaching(ordered, rule["reaching"])].sort().values


PLAIN = {"torch: stable sort": by_sort, "torch: bound": by_bound}
YARDSTICKS = {"yardstick: unchecked": loose}


def results(given: tuple[Any, ...], made: Tensor) -> tuple[Tensor, ...]:
    return (made,)


def cost(at: Setting, given: tuple[Any, ...], device: str) -> Cost:
    score, rule = given
    selected = rule.get("top_k")
    if selected is None:
        selected = len(select_neurons(score, **rule))
    return Cost(size_of(score) + 8 * selected, score.numel())
