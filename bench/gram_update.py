"""gram_update with 100 keys: H += K^T K.

Bytes: the lower triangle of H read, all of H written, the keys read.  Operations: 2 per edit and pair of neurons of
the lower triangle.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import Cost, Setting, setting, size_of
from torch import Tensor

from fastedit.ops.gram_update import gram_update
from fastedit.testing import Factory

COLD = True


def sweep(models: list[str], device: str) -> list[Setting]:
    return [setting(model, "") for model in models]


def memory(at: Setting) -> int:
    """Bytes, at most, that inputs and one call need."""
    return 4 * 4 * at.case.d_ff**2


def inputs(at: Setting, device: str) -> tuple[Any, ...]:
    given = Factory(at.case, torch.float32, device).gram()
    return given.moment, given.keys


def call(given: tuple[Any, ...]) -> None:
    gram_update(*given)


def whole(given: tuple[Any, ...]) -> None:
    """One product; symmetric only up to rounding."""
    history, keys = given
    history.addmm_(keys.T, keys)


PLAIN = {"torch: one product": whole}


def results(given: tuple[Any, ...], made: None) -> tuple[Tensor, ...]:
    history = given[0]
    rows = torch.linspace(0, history.shape[0] - 1, min(64, history.shape[0]), device=history.device).long()
    return (history[rows], history.diagonal().clone())


def cost(at: Setting, given: tuple[Any, ...], device: str) -> Cost:
    history, keys = given
    pairs = history.shape[0] * (history.shape[0] + 1) // 2
    return Cost(pairs * history.element_size() + size_of(history, keys), pairs * (2 * keys.shape[0] + 1), history.dtype)
