"""Keys of edits from the gate and up rows of their lookup tokens.

key_i = sum_t weight_t * activation(gate_{i,t}) * up_{i,t}      mean over the context templates t
mass_a = sum_i |key_{i,a}|                                       over the active edits i
A key is the input of the down-projection at the lookup token. Without an up projection it is activation(gate) alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastedit.ops._check import require, require_dtype, require_float, require_one_device
from fastedit.ops._dispatch import run

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")

# Gates above which gelu is the identity in float32 and float64.
IDENTITY = 1e30


class Keys(NamedTuple):
    """keys: (n_edits, d_ff), one row per edit; mass: (d_ff,), summed |key| of the active edits."""

    keys: Tensor
    mass: Tensor


def capture_keys(
    gate: Tensor, up: Tensor | None, weights: Tensor, activation: str, active: Tensor | None = None
) -> Keys:
    """Keys and mass in float32.

    gate, up: (n_edits, n_templates, d_ff) float32, bf16 or fp16, the outputs of the two projections; up may be None
    weights: (n_templates,) float32, weight of each template in the mean
    activation: one of ACTIVATIONS
    active: (n_edits,) bool, the edits counted in the mass; None = all
    Raises ValueError for shapes, an unknown activation or tensors on several devices, TypeError for dtypes.
    """
    args = CaptureKeys(gate, up, weights, activation, active)
    check(args)
    return Keys(*run("capture_keys", args))


class CaptureKeys(NamedTuple):
    """The arguments of `capture_keys`, in its order."""

    gate: Tensor
    up: Tensor | None
    weights: Tensor
    activation: str
    active: Tensor | None = None


def check(args: CaptureKeys) -> None:
    """Raise ValueError or TypeError for arguments that `capture_keys` does not take."""
    require_one_device("capture_keys", args)
    require("capture_keys", "gate", args.gate, (None, None, None))
    require_float("capture_keys", "gate", args.gate)
    if args.up is not None:
        require("capture_keys", "up", args.up, args.gate.shape, args.gate)

    require("capture_keys", "weights", args.weights, args.gate.shape[1:2])
    require_float("capture_keys", "weights", args.weights)
    if args.active is not None:
        require("capture_keys", "active", args.active, args.gate.shape[:1])
        # An int64 tensor would silently be taken as positions.
        require_dtype("capture_keys", "active", args.active, torch.bool)

    if args.activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"capture_keys: activation must be one of {names}, got {args.activation!r}")


def capture_keys_ref(
    gate: Tensor, up: Tensor | None, weights: Tensor, activation: str, active: Tensor | None = None
) -> Keys:
    """The definition; computes in float32, or in float64 for float64 inputs."""
    working = torch.promote_types(gate.dtype, torch.float32)
    wide = gate.to(working)
    product = activate(wide, activation)
    if activation == "gelu":
        # Torch doubles the gate before it halves it, which overflows; up here the factor is 1.
        product = torch.where(wide > IDENTITY, wide, product)
    if up is not None:
        product = product * up.to(working)

    keys = torch.einsum("itn,t->in", product, weights.to(working))
    counted = keys if active is None else keys[active]
    return Keys(keys, counted.abs().sum(0))


def capture_keys_torch(args: CaptureKeys) -> Keys:
    """The definition is also the plain torch form."""
    return capture_keys_ref(*args)


def activate(gate: Tensor, activation: str) -> Tensor:
    """The activation (one of ACTIVATIONS) of a tensor of any shape, in its dtype."""
    if activation == "silu":
        return F.silu(gate)
    if activation == "relu":
        return F.relu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
