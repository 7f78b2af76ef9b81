"""From the gate and up rows of the lookup tokens to the system matrix of the selected neurons.

keys, mass = capture_keys(gate, up);  S = select_neurons(mass);  A = weight C[S,S] + H[S,S] + P_S^T P_S + K_S^T K_S
P holds the keys of past edits, row per edit. The op is its three parts in a row. A backend of its own runs them on a
GPU without waiting for it: the number of neurons stays in device memory, where the kernel of the matrix reads it, and
the host reads it once, in `Chain.read`, just before the solve.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.ops import capture_keys, masked_gram, select_neurons
from fastedit.ops._check import require, require_dtype, require_float, require_one_device
from fastedit.ops._dispatch import run


class System(NamedTuple):
    """neurons: (k,) int64, the selected ones, ascending; matrix: (k, k) symmetric."""

    neurons: Tensor
    matrix: Tensor


class Chain(NamedTuple):
    """The results of a chain, all of them on the device of its inputs.

    keys: (n_edits, d_ff) float32; mass: (d_ff,) float32
    neurons: (at least k,) int64, of which the first k are the selected ones, ascending
    status: (3,) int64: k, the number of masses that are NaN or Inf, the number of negative ones
    system: (at least k * k,), the matrix packed: A[i, j] at i * k + j
    """

    keys: Tensor
    mass: Tensor
    neurons: Tensor
    status: Tensor
    system: Tensor

    def read(self) -> System:
        """Wait for the device and cut the buffers to the number of neurons.

        Raises ValueError when a mass was NaN, Inf or negative."""
        size, broken, negative = self.status.tolist()
        if broken:
            n = self.mass.numel()
            raise ValueError(f"select_neurons: scores must be finite, got {broken} NaN or Inf of {n}")
        if negative:
            raise ValueError("select_neurons: scores must not be negative when selecting by mass")
        return System(self.neurons[:size], self.system[: size * size].view(size, size))


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

    gate, up, weights, activation, active: as for `capture_keys`; edits that are not active count neither in the mass
        nor in the matrix
    moment, weight, history, dtype: as for `masked_gram`; past: (n_past, d_ff) float32, rows of past keys P, or None
    reaching, within: share of the mass as for `select_neurons`; exactly one
    Raises ValueError and TypeError as the ops do; where nothing waits for a device, a mass that is NaN or Inf is an
    error only in `Chain.read`.
    """
    args = SystemChain(gate, up, weights, activation, active, moment, weight, history, past, reaching, within, dtype)
    check(args)
    return Chain(*run("system_chain", args))


class SystemChain(NamedTuple):
    """The arguments of `system_chain`, in its order."""

    gate: Tensor
    up: Tensor | None
    weights: Tensor
    activation: str
    active: Tensor | None
    moment: Tensor
    weight: float
    history: Tensor | None = None
    past: Tensor | None = None
    reaching: float | None = None
    within: float | None = None
    dtype: torch.dtype = torch.float64

    def capture(self) -> capture_keys.CaptureKeys:
        """The arguments of the first part."""
        return capture_keys.CaptureKeys(self.gate, self.up, self.weights, self.activation, self.active)

    def selection(self, mass: Tensor) -> select_neurons.SelectNeurons:
        """The arguments of the second part, for the mass of the first."""
        return select_neurons.SelectNeurons(mass, None, self.reaching, self.within)

    def system(self, keys: Tensor, index: Tensor) -> masked_gram.MaskedGram:
        """The arguments of the third part, for rows of keys and the selected neurons."""
        return masked_gram.MaskedGram(self.moment, self.weight, keys, self.history, index, self.dtype)


def check(args: SystemChain) -> None:
    """Raise ValueError or TypeError for arguments that `system_chain` does not take."""
    reaching, within = args.reaching, args.within
    share = reaching if within is None else within
    if share is None or not 0 < share <= 1 or (reaching is not None and within is not None):
        raise ValueError(f"system_chain: give reaching or within, in (0, 1], got {reaching} and {within}")

    require_one_device("system_chain", args)
    capture_keys.check(args.capture())
    masked_gram.check_dtype("system_chain", args.dtype)
    d_ff = args.gate.shape[2]
    require("system_chain", "moment", args.moment, (d_ff, d_ff))
    require_float("system_chain", "moment", args.moment)
    if args.history is not None:
        require("system_chain", "history", args.history, (d_ff, d_ff))
        require_float("system_chain", "history", args.history)
    if args.past is not None:
        require("system_chain", "past", args.past, (None, d_ff))
        require_dtype("system_chain", "past", args.past, torch.float32)


def system_chain_ref(
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
    """The definition, by the references of the three ops."""
    keys, mass = capture_keys.capture_keys_ref(gate, up, weights, activation, active)
    index = select_neurons.select_neurons_ref(mass, None, reaching, within)
    matrix = masked_gram.masked_gram_ref(moment, weight, _rows(keys, active, past), history, index, dtype)
    return _chain(keys, mass, index, matrix)


def system_chain_parts(args: SystemChain) -> Chain:
    """The three ops in a row, each on the backend that is chosen for it."""
    keys, mass = run("capture_keys", args.capture())

    selection = args.selection(mass)
    select_neurons.check(selection)
    index = run("select_neurons", selection)

    system = args.system(_rows(keys, args.active, args.past), index)
    masked_gram.check(system)
    return _chain(keys, mass, index, run("masked_gram", system))


def _rows(keys: Tensor, active: Tensor | None, past: Tensor | None) -> Tensor:
    """The keys of past and active edits, one below the other."""
    rows = keys if active is None else keys[active]
    return rows if past is None else torch.cat([past, rows])


def _chain(keys: Tensor, mass: Tensor, index: Tensor, matrix: Tensor) -> Chain:
    return Chain(keys, mass, index, torch.tensor([len(index), 0, 0], device=keys.device), matrix.view(-1))
