"""From the gate and up rows of the lookup tokens to the system matrix of the selected neurons, as one chain of ops.

keys, mass = capture_keys(gate, up);  S = select_neurons(mass);  A = weight C[S,S] + H[S,S] + P_S^T P_S + K_S^T K_S
On a device whose kernels offer it, nothing waits between the rows and the matrix: the number of neurons stays in device
memory and the kernel of the matrix reads it there. It is read once, by `Chain.read`, just before the solve. Elsewhere
the chain is the three public ops one after the other.

A backend takes part with two more functions: `select_on_device(score, top_k, reaching, within) -> (index, count)` in
its module of select_neurons, and, in that of masked_gram, `masked_gram_on_device(moment, weight, keys, history, index,
dtype, count, past, active) -> system`; what they return is described at the fields of `Chain`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.ops import _dispatch
from fastedit.ops.capture_keys import capture_keys
from fastedit.ops.masked_gram import masked_gram
from fastedit.ops.select_neurons import select_neurons

DEVICE_BACKENDS = ("cuda", "triton")


class System(NamedTuple):
    """neurons: (k,) int64, the selected ones, ascending; matrix: (k, k) symmetric."""

    neurons: Tensor
    matrix: Tensor


@dataclass(frozen=True)
class Chain:
    """What a chain leaves behind, all of it where its inputs are.

    keys: (n_edits, d_ff) float32; mass: (d_ff,) float32
    index: (at least k,) int64, of which the first k are the selected neurons, ascending
    count: (3,) int64: k, the number of masses that are NaN or Inf, the number of negative ones
    system: (at least k * k,), the matrix packed: A[i, j] at i * k + j
    """

    keys: Tensor
    mass: Tensor
    index: Tensor
    count: Tensor
    system: Tensor

    def read(self) -> System:
        """Wait for the device and cut the buffers to the number of neurons.

        Raises ValueError when a mass was NaN or Inf."""
        size, broken, negative = self.count.tolist()
        if broken or negative:
            raise ValueError(
                f"select_neurons: scores must be finite, got {broken} NaN or Inf of {self.mass.numel()}"
                if broken
                else "select_neurons: scores must not be negative when selecting by mass"
            )
        return System(self.index[:size], self.system[: size * size].view(size, size))


def system_chain(
    gate: Tensor,
    up: Tensor | None,
    weights: Tensor,
    activation: str,
    active: Tensor | None,
    moment: Tensor,
    weight: float,
    history: Tensor | None = None,
    past: Tensor | None = None,
    *,
    reaching: float | None = None,
    within: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Chain:
    """The chain for one layer.

    gate, up, weights, activation, active: as of `capture_keys`; edits not active count in neither mass nor matrix
    moment, weight, history, dtype: as of `masked_gram`; past: (n_past, d_ff) float32, rows of past keys P, or None
    reaching, within: share of the mass as of `select_neurons`; exactly one
    Raises ValueError and TypeError as the ops do; NaN and Inf are found when a device's chain is read.
    """
    share = reaching if within is None else within
    if share is None or not 0 < share <= 1 or (reaching is not None and within is not None):
        raise ValueError(f"system_chain: give reaching or within, in (0, 1], got {reaching} and {within}")
    fused = _one_launch(gate, up, moment, history, past)
    if fused is not None:
        given = (gate, up, weights, activation, active, moment, weight, history, past, reaching, within, dtype)
        return Chain(*fused.system_chain(*given))
    keys, mass = capture_keys(gate, up, weights, activation, active)
    device = _device_modules(mass, reaching, within, moment, weight, keys, history, dtype)
    if device is not None:
        select, gram = device
        index, count = select.select_on_device(mass, None, reaching, within)
        system = gram.masked_gram_on_device(moment, weight, keys, history, index, dtype, count, past, active)
        return Chain(keys, mass, index, count, system)
    index = select_neurons(mass, reaching=reaching, within=within)
    rows = keys if active is None else keys[active]
    rows = rows if past is None else torch.cat([past, rows])
    system = masked_gram(moment, weight, rows, history, index, dtype)
    return Chain(keys, mass, index, torch.tensor([len(index), 0, 0]), system.view(-1))


def _one_launch(
    gate: Tensor, up: Tensor | None, moment: Tensor, history: Tensor | None, past: Tensor | None
) -> ModuleType | None:
    """The module of the chain in one CUDA launch, where that can run and measured faster than three."""
    if _dispatch.wanted() not in (None, "cuda") or not gate.is_cuda:
        return None
    module = importlib.import_module("fastedit.ops.cuda.system_chain")
    given = (gate, up, moment, history, past)
    return module if module.supports(*given) is None and module.worth(*given) is None else None


def _device_modules(
    mass: Tensor,
    reaching: float | None,
    within: float | None,
    moment: Tensor,
    weight: float,
    keys: Tensor,
    history: Tensor | None,
    dtype: torch.dtype,
) -> tuple[ModuleType, ModuleType] | None:
    """The first backend's modules of select_neurons and masked_gram that can do both without the host."""
    wanted = _dispatch.wanted()
    calls = {
        "select_neurons": (mass, None, reaching, within),
        "masked_gram": (moment, weight, keys, history, None, dtype),
    }
    for name in DEVICE_BACKENDS if wanted is None else [name for name in DEVICE_BACKENDS if name == wanted]:
        if any(_dispatch.unsupported(op, name, *arguments) is not None for op, arguments in calls.items()):
            continue
        modules = tuple(_dispatch.module_of(op, name) for op in calls)
        worth = all(module.worth(*arguments) is None for module, arguments in zip(modules, calls.values(), strict=True))
        if (wanted is not None or worth) and hasattr(modules[1], "masked_gram_on_device"):
            return modules[0], modules[1]
    return None
