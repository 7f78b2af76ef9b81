"""What recipes that train chosen columns share: a batch, what was done to it, and how it is written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastedit.methods.base import NoState, Start
from fastedit.methods.columns.contributions import Slots
from fastedit.methods.columns.training import Trained
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit
from fastedit.weights.apply import RejectedUpdate, add_columns
from fastedit.weights.trial import Trial

log = logging.getLogger(__name__)


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

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: training starts from the weights before the batch."""
        return {}


@dataclass(frozen=True)
class ColumnRecipe:
    """A method that writes columns anywhere below its frozen layers: how it writes a batch, and what it prepares.

    write raises RejectedUpdate; the batch's trial then rolls back."""

    write: Callable[[ColumnBatch], ColumnResult]
    state: Callable[[Start], Any] = lambda start: NoState()
    by_column: bool = True
    # Edits that are trained apart and summed disturb each other.
    batch_size: int = 1

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
        known: Mapping[str, Tensor] | None = None,
    ) -> ColumnResult:
        """Write one batch inside its trial."""
        return self.write(ColumnBatch(start, state, edits, trial, progress))


def _tell_sums(slots: Slots) -> None:
    """Warn of columns that several edits write: each was trained as if it were alone."""
    writers = torch.unique(torch.stack([slots.layers, slots.neurons, slots.edits], 1), dim=0)
    columns, counts = torch.unique(writers[:, :2], dim=0, return_counts=True)
    if bool((counts > 1).any()):
        layer, neuron = columns[counts.argmax()].tolist()
        log.warning(
            "%d of %d columns are written by several edits of the batch, neuron %d of layer %d by %d: their changes are"
            " summed, which smaller batches avoid",
            int((counts > 1).sum()),
            len(columns),
            neuron,
            layer,
            int(counts.max()),
        )


def write_columns(batch: ColumnBatch, slots: Slots, trained: Trained) -> ColumnResult:
    """W_l[:, i] += s_r delta_r for every slot; what several slots add to one column is summed.

    Raises RejectedUpdate naming the edits whose vectors or losses are no numbers."""
    broken = ~torch.isfinite(trained.worst)
    if bool(broken.any()):
        raise RejectedUpdate(int(slots.layers.min()), broken.nonzero().flatten().tolist(), "the loss is not finite")
    _tell_sums(slots)
    result = ColumnResult(slots, trained, [len(batch.edits)])
    for layer in sorted(set(slots.layers.tolist())):
        here = slots.layers == layer
        delta = trained.delta[here]
        if slots.scales is not None:
            delta = delta * slots.scales[here, None].to(delta.dtype)
        result.norms[layer] = add_columns(batch.trial, layer, slots.neurons[here], delta, slots.edits[here])
        result.neurons[layer] = len(set(slots.neurons[here].tolist()))
    return result
