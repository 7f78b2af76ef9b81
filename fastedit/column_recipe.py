"""What recipes that train chosen columns share: a batch, what was done to it, and how it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastedit.adapter import ModelAdapter
from fastedit.apply import RejectedUpdate, add_columns
from fastedit.columns import Trained
from fastedit.edits import Edit
from fastedit.journal import Trial
from fastedit.locate import Slots
from fastedit.method import Start


@dataclass(frozen=True)
class ColumnBatch:
    """One batch of edits on its way into the model. progress: called with the number of edits finished since."""

    start: Start
    state: Any
    edits: Sequence[Edit]
    trial: Trial
    progress: Callable[[int], None] | None = None

    @property
    def model(self) -> ModelAdapter:
        """The model edited."""
        return self.start.model

    @property
    def config(self) -> Any:
        """The method's settings."""
        return self.start.config

    @property
    def prompts(self) -> list[str]:
        """The edits' prompts."""
        return [edit.prompt for edit in self.edits]

    @property
    def targets(self) -> list[str]:
        """The edits' targets."""
        return [edit.target_new for edit in self.edits]


@dataclass
class ColumnResult:
    """What was done to one batch: the slots and their vectors, and see `method.Result`."""

    slots: Slots
    trained: Trained
    written: list[int] = field(default_factory=list)
    neurons: dict[int, int] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)

    @property
    def losses(self) -> Tensor:
        """(n_edits,) loss at the last forward."""
        return self.trained.losses

    @property
    def steps(self) -> Tensor:
        """(n_edits,) int64, Adam steps."""
        return self.trained.steps

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: training starts from the weights before the batch."""
        return {}


@dataclass
class NoState:
    """The state of a method in which a batch leaves nothing for the next."""

    def kept(self, result: ColumnResult) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def take_in(self, kept: Mapping[str, Tensor]) -> None:
        """There is nothing to take in."""

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """There is nothing to go back to."""

    def describe(self) -> dict[str, Any]:
        """Nothing is prepared."""
        return {}

    def adopt(self, described: Mapping[str, Any]) -> None:
        """There is nothing to take over."""


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


@dataclass(frozen=True)
class ColumnRecipe:
    """A method that writes columns anywhere below its frozen layers: how it writes a batch, and what it prepares.

    write raises RejectedUpdate; the batch's trial then rolls back."""

    write: Callable[[ColumnBatch], ColumnResult]
    state: Callable[[Start], Any] = lambda start: NoState()
    by_column: bool = True

    def layers(self, model: ModelAdapter, config: Any) -> tuple[int, ...]:
        """All layers but the frozen ones. Raises ValueError when none is left."""
        if config.frozen_layers >= model.n_layers:
            raise ValueError(f"frozen_layers must be below {model.n_layers}, got {config.frozen_layers}")
        return tuple(range(model.n_layers - config.frozen_layers))

    def template_tokens(self, config: Any) -> int:
        """The target's last token is run too."""
        return 1

    def prepare(self, start: Start) -> Any:
        """The method's state."""
        return self.state(start)

    def run(
        self,
        start: Start,
        state: Any,
        edits: Sequence[Edit],
        trial: Trial,
        progress: Callable[[int], None] | None = None,
        known: Mapping[str, Tensor] | None = None,
    ) -> ColumnResult:
        """Write one batch inside its trial."""
        return self.write(ColumnBatch(start, state, edits, trial, progress))


def write_columns(batch: ColumnBatch, slots: Slots, trained: Trained) -> ColumnResult:
    """W_l[:, i] += s_r delta_r for every slot; what several slots add to one column is summed.

    Raises RejectedUpdate naming the edits whose vectors or losses are no numbers."""
    broken = ~torch.isfinite(trained.worst)
    if bool(broken.any()):
        raise RejectedUpdate(int(slots.layers.min()), broken.nonzero().flatten().tolist(), "the loss is not finite")
    result = ColumnResult(slots, trained, [len(batch.edits)])
    for layer in sorted(set(slots.layers.tolist())):
        here = slots.layers == layer
        delta = trained.delta[here]
        if slots.scales is not None:
            delta = delta * slots.scales[here, None].to(delta.dtype)
        result.norms[layer] = add_columns(batch.trial, layer, slots.neurons[here], delta, slots.edits[here])
        result.neurons[layer] = len(set(slots.neurons[here].tolist()))
    return result
