"""Which edits take part in a round, and which neurons are written."""

from __future__ import annotations

import torch
from torch import Tensor


def active_edits(residual: Tensor, smallest: float, largest: float) -> Tensor:
    """(n_edits,) bool: smallest < ||z - h|| < largest, both strict. residual: (n_edits, d_model).

    NSE's rule; its upper bound is in the released code only. A NaN residual is kept out by neither bound: it counts
    as active, so that the update is refused instead of the edit being skipped silently."""
    distance = torch.linalg.vector_norm(residual, dim=1)
    return ~((distance <= smallest) | (distance >= largest))


def mass_rule(share: float, as_released: bool) -> dict[str, float] | None:
    """The rule by which neurons are selected, as an argument of `select_neurons`; None for every neuron.

    The paper takes the smallest set reaching `share` of the mass; the released code the largest set within it."""
    if share >= 1:
        return None
    return {"within": share} if as_released else {"reaching": share}
