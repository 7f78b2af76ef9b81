"""Exact selection of neurons by score: the k largest, or a prefix of the descending order by cumulative mass.

Order: descending score, smallest index first among equal scores. Result: ascending indices.
There are three rules, of which a call gives exactly one:
  top_k     the first k
  reaching  the smallest prefix whose summed score is at least p * total (the NSE paper); at least one neuron
  within    the longest prefix whose summed score is at most p * total (the released NSE code); at least one neuron,
            where the released code fails
Sums are taken in float64. p = 1 selects every neuron.
"""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.ops._check import require, require_float
from fastedit.ops._dispatch import run


def select_neurons(
    score: Tensor, *, top_k: int | None = None, reaching: float | None = None, within: float | None = None
) -> Tensor:
    """Indices of the selected neurons, (n_selected,) int64, ascending.

    score: (d_ff,) float, finite and not negative (negative scores are allowed with top_k)
    Raises ValueError for NaN or Inf scores, a share outside (0, 1], k outside [1, d_ff], or not exactly one rule,
    TypeError for scores that are not floating-point.
    """
    args = SelectNeurons(score, top_k, reaching, within)
    check(args)
    return run("select_neurons", args)


class SelectNeurons(NamedTuple):
    """The arguments of `select_neurons`, in its order."""

    score: Tensor
    top_k: int | None = None
    reaching: float | None = None
    within: float | None = None

    @property
    def share(self) -> float | None:
        """The share of the mass that `reaching` or `within` names; None with `top_k`."""
        return self.within if self.reaching is None else self.reaching


def check(args: SelectNeurons) -> None:
    """Raise ValueError or TypeError for arguments that `select_neurons` does not take. Waits for the device."""
    score, top_k, reaching, within = args
    require("select_neurons", "score", score, (None,))
    require_float("select_neurons", "score", score)
    if (top_k is None) + (reaching is None) + (within is None) != 2:
        raise ValueError("select_neurons: give exactly one of top_k, reaching, within")

    # A NaN is both the smallest and the largest: one pass answers for NaN, Inf and sign.
    ends = score.detach().aminmax() if score.numel() else (0.0, 0.0)
    smallest, largest = (float(end) for end in ends)
    if not (isfinite(smallest) and isfinite(largest)):
        broken = int((~torch.isfinite(score)).sum())
        raise ValueError(f"select_neurons: scores must be finite, got {broken} NaN or Inf of {score.numel()}")

    if top_k is not None:
        if not 1 <= top_k <= score.numel():
            raise ValueError(f"select_neurons: top_k must be in [1, {score.numel()}], got {top_k}")
        return

    share = args.share
    if share is None or not 0 < share <= 1:
        raise ValueError(f"select_neurons: the share must be in (0, 1], got {share}")
    if smallest < 0:
        raise ValueError("select_neurons: scores must not be negative when selecting by mass")


def select_neurons_ref(
    score: Tensor, top_k: int | None = None, reaching: float | None = None, within: float | None = None
) -> Tensor:
    """The definition, by a full stable sort."""
    order = torch.argsort(score, descending=True, stable=True)
    if top_k is not None:
        return order[:top_k].sort().values

    share = reaching if reaching is not None else within
    if share is None or share >= 1:
        return torch.arange(score.numel(), device=score.device)

    cumulative = score[order].double().cumsum(0)
    bound = share * cumulative[-1:]
    if reaching is not None:
        count = int((cumulative < bound).sum()) + 1
    else:
        count = max(1, int((cumulative <= bound).sum()))
    return order[:count].sort().values


def select_neurons_torch(args: SelectNeurons) -> Tensor:
    """The definition is also the plain torch form."""
    return select_neurons_ref(*args)
