"""sparse_adam on the values of 100 edits, and on an ensemble of 1 % of the neurons of a 32-layer model (KNE).

Bytes: delta, gradient and both moments read, all but the gradient written; penalty and radius read.
Operations: 24 per element: 2 for each of two norms, 3 for the penalty's gradient, 3 and 4 for the moments, 6 for the
step, 4 for square root, division and floor.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import Cost, Setting, setting, size_of
from torch import Tensor

from fastedit.ops.sparse_adam import AdamSettings, sparse_adam
from fastedit.testing import Factory

# A backward through half the model lies between two steps.
COLD = True
SETTINGS = AdamSettings(lr=0.1)
STEP = 7


def sweep(models: list[str], device: str) -> list[Setting]:
    values = [setting(model, "values") for model in models]
    ensemble = [
        setting(model, "ensemble", n_edits=round(0.01 * 32 * 14336)) for model in models if model == "llama-3-8b"
    ]
    return values + ensemble


def memory(at: Setting) -> int:
    """Bytes, at most, that inputs and one call need; the factory draws in float64."""
    return 16 * 8 * at.case.n_edits * at.case.d_model


def inputs(at: Setting, device: str) -> tuple[Any, ...]:
    return tuple(Factory(at.case, at.dtype, device).adam())


def call(given: tuple[Any, ...]) -> None:
    delta, grad, moment1, moment2, decay, radius = given
    sparse_adam(delta, grad, moment1, moment2, STEP, SETTINGS, decay, radius)


def in_place(given: tuple[Any, ...]) -> None:
    """Torch's in-place arithmetic, with as few temporaries as possible."""
    delta, grad, moment1, moment2, decay, radius = given
    norm = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
    grad = torch.addcmul(grad, delta, torch.where(norm > 0, decay[:, None] / norm, torch.zeros_like(norm)))
    moment1.lerp_(grad, 1 - SETTINGS.beta1)
    moment2.mul_(SETTINGS.beta2).addcmul_(grad, grad, value=1 - SETTINGS.beta2)
    root = moment2.sqrt().div_((1 - SETTINGS.beta2**STEP) ** 0.5).add_(SETTINGS.eps)
    delta.addcdiv_(moment1, root, value=-SETTINGS.lr / (1 - SETTINGS.beta1**STEP))
    delta.mul_((radius[:, None] / torch.linalg.vector_norm(delta, dim=1, keepdim=True)).clamp_(max=1))


PLAIN = {"torch: in place": in_place}


def results(given: tuple[Any, ...], made: None) -> tuple[Tensor, ...]:
    return tuple(part.clone() for part in (given[0], given[2], given[3]))


def cost(at: Setting, given: tuple[Any, ...], device: str) -> Cost:
    delta, grad, moment1, moment2, decay, radius = given
    return Cost(2 * size_of(delta, moment1, moment2) + size_of(grad, decay, radius), 24 * delta.numel(), delta.dtype)
