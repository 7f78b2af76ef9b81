"""Selection: which edits take part in a round, and which neurons are written."""

from __future__ import annotations

import torch
from torch import Tensor


def active_edits(residual: Tensor, smallest: float, largest: float) -> Tensor:
    """Edits with smallest < ||residual|| < largest, both strict; (n_edits,) bool.

    residual: (n_edits, d_model), z - h

    This is NSE's rule; the upper bound is in its released code only. An edit whose residual is NaN counts as active:
    its update is then refused, where the edit would otherwise be skipped in silence."""
    distance = torch.linalg.vector_norm(residual, dim=1)
    return ~((distance <= smallest) | (distance >= largest))


def mass_rule(share: float, as_released: bool) -> dict[str, float] | None:
    """The rule that selects neurons by their mass, as keyword arguments of `select_neurons`; None = every neuron.

    share: p in (0, 1], share of the summed mass
    as_released: False, the smallest set that reaches the share (NSE's paper); True, the largest set within it (NSE's
        released code)"""
    if share >= 1:
        return None
    return {"within": share} if as_released else {"reaching": share}
