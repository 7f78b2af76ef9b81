"""The chain of capture_keys, select_neurons and masked_gram in their three launches; the host waits for nothing.
The definition is that of `fastedit.ops.system_chain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastedit.kernels._launch import first, not_worth, unavailable
from fastedit.kernels.capture_keys import capture_keys
from fastedit.kernels.capture_keys import supports as rows_supported
from fastedit.kernels.masked_gram import masked_gram_on_device
from fastedit.kernels.select_neurons import select_on_device, too_many

if TYPE_CHECKING:
    from fastedit.ops.system_chain import SystemChain


def supports(args: SystemChain) -> str | None:
    """None, or why the kernels cannot take these arguments."""
    return first(unavailable(args), rows_supported(args.capture()), too_many(args.gate.shape[2]))


def worth(args: SystemChain) -> str | None:
    """None, or why the kernels are not the faster choice."""
    return not_worth()


def system_chain(args: SystemChain) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `fastedit.ops.system_chain.Chain`. The number of neurons stays in device memory."""
    keys, mass = capture_keys(args.capture())
    neurons, status = select_on_device(args.selection(mass))
    system = masked_gram_on_device(args.system(keys, neurons), status, args.past, args.active)
    return keys, mass, neurons, status, system
