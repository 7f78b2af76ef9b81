"""What methods that write columns carry from batch to batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastedit.methods.base import NoState, Start
from fastedit.methods.columns.contributions import Slots, common_neurons
from fastedit.model.background_text import Source
from fastedit.runtime.hashing import tensors_hash

if TYPE_CHECKING:
    from fastedit.methods.columns.recipe import ColumnResult


@dataclass
class FirstSlots(NoState):
    """The first batch's slots, for a stream with a fixed ensemble."""

    slots: Slots | None = None

    def kept(self, result: ColumnResult) -> dict[str, Tensor]:
        """The slots, of the first batch."""
        return result.slots.tensors() if self.slots is None else {}

    def take_in(self, kept: Mapping[str, Tensor]) -> None:
        """The first batch's slots stay."""
        if kept:
            self.load(kept)

    def tensors(self) -> dict[str, Tensor]:
        """The slots."""
        return {} if self.slots is None else self.slots.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The slots as they were."""
        self.slots = Slots(**tensors) if tensors else None


class LeftOut(NoState):
    """FiNE's state: the neurons that are not chosen. common: (n_layers, d_ff) bool, those common in the editor's text,
    found once; written: those that committed batches wrote, with `protect`. Each None where it is not asked for."""

    def __init__(self, start: Start) -> None:
        self._shape = (start.model.n_layers, start.model.d_ff)
        self.protect: bool = start.config.protect
        self.common = None if start.config.common_share is None else _common(start)
        self.written: Tensor | None = None
        self.load({})

    @property
    def left_out(self) -> Tensor | None:
        """(n_layers, d_ff) bool: all of them, or None."""
        if self.common is None or self.written is None:
            return self.written if self.common is None else self.common
        return self.common | self.written

    def kept(self, result: ColumnResult) -> dict[str, Tensor]:
        """Where the batch wrote, with `protect`."""
        return {"layers": result.slots.layers, "neurons": result.slots.neurons} if self.protect else {}

    def take_in(self, kept: Mapping[str, Tensor]) -> None:
        """What was written is left out from now on."""
        if kept and self.written is not None:
            self.written[kept["layers"], kept["neurons"]] = True

    def tensors(self) -> dict[str, Tensor]:
        """The neurons written, with `protect`."""
        return {} if self.written is None else {"written": self.written}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Leave out those written then."""
        if self.protect:
            self.written = tensors["written"] if tensors else torch.zeros(self._shape, dtype=torch.bool)

    def describe(self) -> dict[str, Any]:
        """The SHA-256 of the common neurons, or None."""
        return {"common": None if self.common is None else tensors_hash({"common": self.common})}

    def adopt(self, described: Mapping[str, Any]) -> None:
        """Raises ValueError where other neurons are common."""
        if self.describe() != described:
            raise ValueError("the neurons common in the background text are not those that the run began with")


def _common(start: Start) -> Tensor:
    """The neurons that are common in the editor's text, or in what the unedited model writes; (n_layers, d_ff) bool."""
    model, config = start.model, start.config
    source = start.moments if isinstance(start.moments, Source) else Source(seed=start.seed)
    layers = range(model.n_layers - config.frozen_layers)
    with start.weights.rewound(), torch.no_grad():
        windows = source.windows(model, config.background, start.progress)
        with model.packed():
            gate_only = config.score_activation == "gate_only"
            return common_neurons(model, windows, config.neurons, layers, config.common_share, gate_only)
