"""Selection: which edits take part in a round, and which neurons are written."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def active_edits(residual: Tensor, smallest: float, largest: float) -> Tensor:
    """Edits with smallest < ||residual|| < largest, both strict; (n_edits,) bool.

    residual: (n_edits, d_model), z - h

    This is NSE's rule; the upper bound is in its released code only. An edit whose residual is NaN counts as active:
    its update is then refused, where the edit would otherwise be skipped in silence."""
    distance = torch.linalg.vector_norm(residual, dim=1)
    return ~((distance <= smallest) | (distance >= largest))


class MassRule(NamedTuple):
    """Selects neurons by cumulative mass; one of the two is a share in (0, 1), the other None.

    reaching: the smallest set whose mass reaches this share of the sum (NSE's paper)
    within: the largest set whose mass stays within this share (NSE's released code)
    """

    reaching: float | None = None
    within: float | None = None


def mass_rule(share: float, as_released: bool) -> MassRule | None:
    """The rule for a share p in (0, 1] of the mass; None = every neuron. as_released: see `MassRule`."""
    if share >= 1:
        return None
    return MassRule(within=share) if as_released else MassRule(reaching=share)
