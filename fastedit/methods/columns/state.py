"""What methods that write columns carry from batch to batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastedit.methods.base import NoState, Start
from fastedit.methods.columns.config import FiNEConfig
from fastedit.methods.columns.contributions import Slots, common_neurons
from fastedit.runtime.hashing import tensors_hash

if TYPE_CHECKING:
    from fastedit.methods.columns.recipe import ColumnResult


@dataclass
class FirstSlots(NoState):
    """KNE's state: the slots of the first batch, which a fixed ensemble keeps for the whole stream."""

    slots: Slots | None = None

    def kept(self, result: ColumnResult) -> dict[str, Tensor]:
        """The slots, if this is the first batch."""
        return result.slots.tensors() if self.slots is None else {}

    def take_in(self, kept: Mapping[str, Tensor]) -> None:
        """Keep the slots of the first batch."""
        if kept:
            self.load(kept)

    def tensors(self) -> dict[str, Tensor]:
        """The slots."""
        return {} if self.slots is None else self.slots.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Return to these slots, or to none."""
        self.slots = Slots(**tensors) if tensors else None


class LeftOut(NoState):
    """FiNE's state: the neurons that are not chosen.

    common: (n_layers, d_ff) bool, the neurons common in the background text, found once; None without `common_share`
    written: (n_layers, d_ff) bool, the neurons that committed batches wrote; None without `protect`
    """

    def __init__(self, start: Start[FiNEConfig]) -> None:
        self._shape = (start.model.n_layers, start.model.d_ff)
        self.protect = start.config.protect
        self.common = _common(start)
        self.written: Tensor | None = None
        self.load({})

    @property
    def left_out(self) -> Tensor | None:
        """(n_layers, d_ff) bool: the common and the written neurons, or None."""
        if self.common is None or self.written is None:
            return self.written if self.common is None else self.common
        return self.common | self.written

    def kept(self, result: ColumnResult) -> dict[str, Tensor]:
        """With `protect`, the layer and neuron of every slot that the batch wrote."""
        return {"layers": result.slots.layers, "neurons": result.slots.neurons} if self.protect else {}

    def take_in(self, kept: Mapping[str, Tensor]) -> None:
        """Leave out what the batch wrote from now on."""
        if kept and self.written is not None:
            self.written[kept["layers"], kept["neurons"]] = True

    def tensors(self) -> dict[str, Tensor]:
        """The neurons written, with `protect`."""
        return {} if self.written is None else {"written": self.written}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Leave out the neurons that were written then."""
        if self.protect:
            self.written = tensors["written"] if tensors else torch.zeros(self._shape, dtype=torch.bool)

    def describe(self) -> dict[str, Any]:
        """The SHA-256 of the common neurons, or None."""
        return {"common": None if self.common is None else tensors_hash({"common": self.common})}

    def adopt(self, described: Mapping[str, Any]) -> None:
        """Check that the same neurons are common. Raises ValueError where they are not."""
        if self.describe() != described:
            raise ValueError("the neurons common in the background text are not those that the run began with")


def _common(start: Start[FiNEConfig]) -> Tensor | None:
    """(n_layers, d_ff) bool: the neurons common in the background text; None where the config leaves none out."""
    model, config = start.model, start.config
    if config.common_share is None:
        return None

    layers = range(model.n_layers - config.frozen_layers)
    gate_only = config.score_activation == "gate_only"
    with start.weights.rewound(), torch.no_grad():
        windows = start.text.windows(model, config.background, start.progress)
        with model.packed():
            return common_neurons(model, windows, config.neurons, layers, config.common_share, gate_only)
