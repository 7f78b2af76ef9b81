"""capture_keys at 100 edits in six context templates: float32 rows on the CPU, bf16 on a GPU.

Bytes: gate and up once, keys and mass written.  Operations: per element of gate 4 for a sigmoid's product (8 for a
GELU), 1 for up, 2 for the mean; 2 per key for the mass.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import Cost, Setting, setting, size_of

from fastedit.ops.capture_keys import Keys, activate, capture_keys
from fastedit.testing import Factory

# An edit captures the rows of a layer right after its projections have written them, but at the real sizes the
# projections write more than the caches hold.
COLD = True


def sweep(models: list[str], device: str) -> list[Setting]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [setting(model, "", dtype) for model in models]


def memory(at: Setting) -> int:
    """Bytes, at most, that inputs and one call need."""
    return 8 * at.case.n_edits * at.case.n_templates * at.case.d_ff * 4


def inputs(at: Setting, device: str) -> tuple[Any, ...]:
    gate, up, weights, _ = Factory(at.case, at.dtype, device).capture()
    return gate, up if at.size.gated else None, weights, at.size.activation


def call(given: tuple[Any, ...]) -> Keys:
    return capture_keys(*given)


def in_place(given: tuple[Any, ...]) -> Keys:
    """As few passes as torch allows: the product in place, the mean as a product of matrices."""
    gate, up, weights, activation = given
    wide = gate.float()
    product = activate(wide, activation)
    if up is not None:
        product.mul_(up)
    keys = torch.matmul(weights, product)
    return Keys(keys, torch.linalg.vector_norm(keys, 1, dim=0))


def by_template(given: tuple[Any, ...]) -> Keys:
    """A template at a time, so that the product stays small."""
    gate, up, weights, activation = given
    keys = gate.new_zeros(gate.shape[0], gate.shape[2], dtype=torch.float32)
    for t, weight in enumerate(weights.tolist()):
        product = activate(gate[:, t].float(), activation)
        keys.add_(product if up is None else product.mul_(up[:, t]), alpha=weight)
    return Keys(keys, torch.linalg.vector_norm(keys, 1, dim=0))


PLAIN = {"torch: in place": in_place, "torch: by template": by_template}


def results(given: tuple[Any, ...], made: Keys) -> tuple[torch.Tensor, ...]:
    return tuple(made)


def cost(at: Setting, given: tuple[Any, ...], device: str) -> Cost:
    gate, up, weights, activation = given
    n_keys = gate.shape[0] * gate.shape[2]
    per_element = (4 if activation == "silu" else 8) + (up is not None) + 2
    moved = size_of(gate, up, weights) + 4 * (n_keys + gate.shape[2])
    return Cost(moved, per_element * gate.numel() + 2 * n_keys)
