"""What recipes that train chosen columns share: a batch, what was done to it, and how it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """One batch of edits on its way into the model. progress: called with what was finished since, in edits."""

    start: Start
    state: Any
    edits: Sequence[Edit]
    trial: Trial
    progress: Callable[[float], None] | None = None

    def stage(self, share: float, units: int) -> Callable[[float], None] | None:
        """The callback of a stage that is `share` of the batch's work and is counted in so many units of its own."""
        report, worth = self.progress, share * len(self.edits) / units
        return None if report is None else lambda n: report(n * worth)

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


@dataclass
class NoState:
    """The state of a method in which a batch leaves nothing for the next."""

    def snapshot(self) -> None:
        """There is nothing to keep."""
        return

    def restore(self, snapshot: None) -> None:
        """There is nothing to go back to."""

    def remember(self, result: ColumnResult) -> None:
        """There is nothing to remember."""


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
        progress: Callable[[float], None] | None = None,
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
