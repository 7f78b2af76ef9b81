"""What recipes that train chosen columns share: a batch, what was done to it, and how it is written."""

from __future__ import annotations

import logging
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
from fastedit.locate import Slots, common_neurons
from fastedit.method import Start
from fastedit.runlog import tensors_hash
from fastedit.stats import Source

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
