"""What the methods that write columns share: a batch and its result, the method object, the write of a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fastedit.methods.base import AnyState, Method, Progress, Start
from fastedit.methods.columns.config import ColumnConfig
from fastedit.methods.columns.contributions import Slots
from fastedit.methods.columns.training import Trained
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit
from fastedit.weights.apply import RejectedUpdate, add_columns
from fastedit.weights.trial import Trial

log = logging.getLogger(__name__)


G = TypeVar("G", bound=ColumnConfig)
S = TypeVar("S", bound=AnyState)


@dataclass(frozen=True)
class ColumnBatch(Generic[G, S]):
    """One batch of edits on its way into the model.

    progress: called with the share of work finished since the last call, in edits
    """

    start: Start[G]
    state: S
    edits: Sequence[Edit]
    trial: Trial
    progress: Progress | None = None

    def stage(self, share: float, units: int) -> Progress | None:
        """The callback of a stage that is `share` of the batch's work and counts `units` units of its own."""
        report = self.progress
        if report is None:
            return None

        worth = share * len(self.edits) / units
        return lambda n: report(n * worth)

    @property
    def model(self) -> ModelAdapter:
        """The edited model."""
        return self.start.model

    @property
    def config(self) -> G:
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

    @property
    def joins(self) -> list[str | None]:
        """What stands between prompts and targets, see `Edit.join`."""
        return [edit.join for edit in self.edits]


@dataclass
class ColumnResult:
    """What was done to one batch: the slots and their vectors, and see `methods.base.Result`."""

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

    @property
    def is_written(self) -> Tensor:
        """(n_edits,) bool: every edit is written."""
        return torch.ones(len(self.losses), dtype=torch.bool)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: training starts from the weights before the batch."""
        return {}


@dataclass(frozen=True, kw_only=True)
class ColumnMethod(Method[G, S]):
    """A method that writes single columns of any layer below its frozen ones.

    recipe: writes a batch; raises RejectedUpdate, and the batch's trial is then rolled back
    make_state: makes the state of an editor
    needs_text: whether the state reads background text
    """

    recipe: Callable[[ColumnBatch[G, S]], ColumnResult]
    make_state: Callable[[Start[G]], S]
    needs_text: Callable[[G], bool] = lambda config: False
    by_column: bool = True
    # Edits that are trained apart and summed disturb each other.
    batch_size: int = 1
    token_budget_setting: str | None = "train.token_budget"
    # Neurons are found from the prompt's tokens.
    needs_subject: bool = False

    def layers(self, model: ModelAdapter, config: G) -> tuple[int, ...]:
        """All layers but the frozen ones. Raises ValueError when none is left."""
        if config.frozen_layers >= model.n_layers:
            raise ValueError(f"frozen_layers must be below {model.n_layers}, got {config.frozen_layers}")
        return tuple(range(model.n_layers - config.frozen_layers))

    def template_tokens(self, config: G) -> int:
        """The target's last token, which is run too."""
        return 1

    def reads_text(self, config: G) -> bool:
        """As `needs_text` says."""
        return self.needs_text(config)

    def prepare(self, start: Start[G]) -> S:
        """Make the method's state."""
        return self.make_state(start)

    def write_batch(
        self,
        start: Start[G],
        state: S,
        edits: Sequence[Edit],
        trial: Trial,
        progress: Progress | None = None,
        known: Mapping[str, Tensor] | None = None,
    ) -> ColumnResult:
        """Write one batch inside its trial. `known` is not used: training starts from the weights before the batch."""
        return self.recipe(ColumnBatch(start, state, edits, trial, progress))


def _warn_of_shared_columns(slots: Slots) -> None:
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


def write_columns(batch: ColumnBatch[G, S], slots: Slots, trained: Trained) -> ColumnResult:
    """W_l[:, i] += s_r delta_r for every slot; what several slots add to one column is summed.

    Raises RejectedUpdate naming the edits whose vectors or losses are not finite."""
    broken = ~torch.isfinite(trained.worst)
    if bool(broken.any()):
        raise RejectedUpdate(int(slots.layers.min()), broken.nonzero().flatten().tolist(), "the loss is not finite")

    _warn_of_shared_columns(slots)
    result = ColumnResult(slots, trained, [len(batch.edits)])

    for layer in sorted(set(slots.layers.tolist())):
        here = slots.layers == layer
        delta = trained.delta[here]
        if slots.scales is not None:
            delta = delta * slots.scales[here, None].to(delta.dtype)

        result.norms[layer] = add_columns(batch.trial, layer, slots.neurons[here], delta, slots.edits[here])
        result.neurons[layer] = len(set(slots.neurons[here].tolist()))

    return result
