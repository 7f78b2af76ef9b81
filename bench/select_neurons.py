"""select_neurons on heavy-tailed scores: 30 % and 80 % of the neurons by rank, and the prefix that reaches a mass.

Bytes: the scores read once, the indices written.  Operations: a comparison per score.  Both are so few that the roof
is microseconds: what is measured is the number of passes and of launches.
"""

from __future__ import annotations

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
    found = []
    for model in models:
        found += [setting(model, f"k={share:.0%}", options={"share": share}) for share in SHARES]
        found += [setting(model, f"mass={mass:.0%}", options={"reaching": mass}) for mass in MASSES]
    return found


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


def loose(given: tuple[Any, ...]) -> Tensor:
    """Torch's partial sort for a rank, its unstable sort for a mass: quicker, with ties in any order."""
    score, rule = given
    if "top_k" in rule:
        return score.topk(rule["top_k"], sorted=False).indices.sort().values
    ordered, order = score.sort(descending=True)
    reached = ordered.cumsum(0, dtype=torch.float64)
    bound = rule["reaching"] * reached[-1:]
    return order[: int(torch.searchsorted(reached, bound)) + 1].sort().values


def by_mask(given: tuple[Any, ...]) -> Tensor:
    """The same with a mask in place of the second sort."""
    score, rule = given
    if "top_k" in rule:
        taken = score.topk(rule["top_k"], sorted=False).indices
    else:
        ordered, order = score.sort(descending=True)
        reached = ordered.cumsum(0, dtype=torch.float64)
        taken = order[: int(torch.searchsorted(reached, rule["reaching"] * reached[-1:])) + 1]
    return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, taken, True).nonzero().flatten()


PLAIN = {"torch: topk or sort": loose, "torch: topk or sort, mask": by_mask}


def results(given: tuple[Any, ...], made: Tensor) -> tuple[Tensor, ...]:
    return (made,)


def cost(at: Setting, given: tuple[Any, ...], device: str) -> Cost:
    score, rule = given
    selected = rule.get("top_k")
    if selected is None:
        selected = len(select_neurons(score, **rule))
    return Cost(size_of(score) + 8 * selected, score.numel())
