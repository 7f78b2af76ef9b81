"""What the editor asks of a method: its settings, the weights it may write, what it prepares, how it writes one batch.

A method of your own is an object of a shipped kind with another recipe (`ClosedFormMethod`, `ColumnMethod`), or of a
subclass of `Method`; `Editor(method=...)` takes it as it takes a name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

from torch import Tensor

from fastedit.config import EditConfig, MomentConfig, as_changes, changed, setting_of
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.records.edit import Edit
from fastedit.runtime.progress import Show
from fastedit.weights.trial import Trial

if TYPE_CHECKING:
    from fastedit.weights.editable import EditableWeights

C = TypeVar("C", bound=EditConfig)
S = TypeVar("S", bound="AnyState")
R_contra = TypeVar("R_contra", contravariant=True)

Progress = Callable[[float], None]

# Fields of a method's settings for a model, from the model and what the caller sets.
Derive: TypeAlias = Callable[[ModelAdapter, Mapping[str, Any]], dict[str, Any]]


class CannotDerive(ValueError):
    """Settings cannot be derived for this model."""


@dataclass(frozen=True)
class Sweep:
    """What `fastedit suggest` varies beside the derived settings.

    setting: its dotted name
    values: the values tried, from the model and the derived settings
    """

    setting: str
    values: Callable[[ModelAdapter, Any], Sequence[Any]]


@dataclass(frozen=True)
class Start(Generic[C]):
    """What an editor was made with.

    config: the method's settings
    moments: second moments by layer, (d_ff, d_ff) each, or the text to compute them from; None = the model's own text
    seed: of context templates and sampled text
    progress: True or False shows or hides progress bars, None shows them on a terminal; a `Lines` gets lines of text
    """

    model: ModelAdapter
    weights: EditableWeights
    config: C
    moments: Mapping[int, Tensor] | Source | None = None
    seed: int = 0
    progress: Show = None

    @property
    def text(self) -> Source:
        """The background text: the editor's own, else text sampled from the model."""
        return self.moments if isinstance(self.moments, Source) else Source(seed=self.seed)


class Result(Protocol):
    """What was done to one batch inside its trial."""

    @property
    def losses(self) -> Tensor:
        """(n_edits,) loss at the last forward; NaN where the method computes none."""
        ...

    @property
    def steps(self) -> Tensor:
        """(n_edits,) int64, Adam steps."""
        ...

    @property
    def written(self) -> list[int]:
        """Number of edits written in each round."""
        ...

    @property
    def is_written(self) -> Tensor:
        """(n_edits,) bool on the CPU: whether an update was written for the edit in some round."""
        ...

    @property
    def neurons(self) -> dict[int, int]:
        """layer -> number of neurons written last."""
        ...

    @property
    def norms(self) -> dict[int, float]:
        """layer -> summed Frobenius norms of the updates."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What writing some of these edits again can start from, by name, one row per edit.

        `Method.write_batch` takes rows of it as `known`. Another number of rows is a ValueError when the batch is
        written."""
        ...


def check_result(method: str, result: Result, n_edits: int) -> None:
    """Raise ValueError unless `is_written` and every tensor of a result have one row per edit of the batch.

    method: its name, for the error"""
    rows = {"is_written": result.is_written}
    rows |= {f"tensors()[{name!r}]": tensor for name, tensor in result.tensors().items()}

    for name, tensor in rows.items():
        given: object = tensor
        if isinstance(given, Tensor) and given.ndim and len(given) == n_edits:
            continue

        shape = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"type {type(given).__name__}"
        raise ValueError(
            f"{method}: {name} of its result has {shape}, wanted a tensor with one row for each of the {n_edits} edits"
            " of the batch"
        )


class State(Protocol[R_contra]):
    """What a method carries from batch to batch."""

    def kept(self, result: R_contra) -> dict[str, Tensor]:
        """What the state adds of a batch, by name, such as its keys. `take_in` adds it once the batch is committed."""
        ...

    def take_in(self, kept: Mapping[str, Tensor]) -> None:
        """Advance by one committed batch, whose `kept` this is."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes from batch to batch, by name. `take_in` may write into these tensors."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Return to what `tensors` returned, bit for bit; an empty mapping is the state before the first batch."""
        ...

    def describe(self) -> dict[str, Any]:
        """What was prepared, as plain data; large tensors by their SHA-256."""
        ...

    def adopt(self, described: Mapping[str, Any]) -> None:
        """Take over what `describe` returned in an earlier process. Raises ValueError where the two do not agree."""
        ...


AnyState: TypeAlias = State[Any]


class NoState:
    """The state of a method in which a batch leaves nothing for the next one."""

    def kept(self, result: Any) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def take_in(self, kept: Mapping[str, Tensor]) -> None:
        """Nothing to add."""

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to return to."""

    def describe(self) -> dict[str, Any]:
        """Nothing is prepared."""
        return {}

    def adopt(self, described: Mapping[str, Any]) -> None:
        """Nothing to take over."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC, Generic[C, S]):
    """An editing method: one object that owns its settings, its presets and its recipe.

    name: on the command line, in reports and in run directories
    config_class: type of its settings
    presets: folder of `<name>.yaml` files; None = no preset ships
    derive: makes the settings for a model without a preset; raises CannotDerive. None = the caller passes a config
    is_checked: whether derived settings are tried on a few facts before the first edit
    sweep: what `fastedit suggest` varies
    by_column: it writes few columns of its layers, so originals are kept column by column
    batch_size: edits written together by default
    token_budget_setting: dotted name of the setting that bounds the rows optimised together, which is halved when
        memory runs out; None = nothing is optimised
    text_setting: name of the `MomentConfig` that says how much background text is read; None = none is
    uses_second_moments: whether that text is read for second moments
    needs_subject: whether it reads the subject of an edit
    """

    name: str
    config_class: type[C]
    presets: Path | None = None
    derive: Derive | None = None
    is_checked: bool = True
    sweep: Sweep | None = None
    by_column: bool = False
    batch_size: int = 100
    token_budget_setting: str | None = None
    text_setting: str | None = None
    uses_second_moments: bool = False
    needs_subject: bool = True

    @abstractmethod
    def layers(self, model: ModelAdapter, config: C) -> tuple[int, ...]:
        """The layers it may write. Raises ValueError when config and model do not fit together."""

    @abstractmethod
    def prepare(self, start: Start[C]) -> S:
        """Make the state; can take minutes."""

    @abstractmethod
    def write_batch(
        self,
        start: Start[C],
        state: S,
        edits: Sequence[Edit],
        trial: Trial,
        progress: Progress | None = None,
        known: Mapping[str, Tensor] | None = None,
    ) -> Result:
        """Write one batch inside its trial.

        progress: called with the number of edits finished since the last call; with 0 where the batch may be abandoned
        known: the rows of these edits in `Result.tensors` of an earlier write
        Raises RejectedUpdate or NotPositiveDefinite for a batch that cannot be written: it is rolled back, recorded as
        rejected, and the stream stops or goes on, as `on_error` says. Any other exception is a fault of the method. It
        rolls the batch back too, but always leaves `Editor.edit`, and nothing is recorded."""

    def template_tokens(self, config: C) -> int:
        """Tokens that the method puts around a prompt and its target."""
        return 0

    def reads_text(self, config: C) -> bool:
        """Whether `prepare` reads background text with these settings."""
        return self.text_setting is not None

    def text_config(self, config: C) -> MomentConfig | None:
        """How much background text is read; None = none is."""
        return None if self.text_setting is None else getattr(config, self.text_setting)

    def token_budget(self, config: C) -> int | None:
        """The value of the setting that `token_budget_setting` names."""
        if self.token_budget_setting is None:
            return None

        return int(setting_of(config.model_dump(), self.token_budget_setting))

    def with_token_budget(self, config: C, budget: int | None) -> C:
        """The settings with another token budget; None leaves them as they are."""
        if self.token_budget_setting is None or budget is None:
            return config

        return changed(config, as_changes(self.token_budget_setting, budget))


# What holds a method and its state without knowing their types.
AnyMethod: TypeAlias = Method[Any, Any]
AnyStart: TypeAlias = Start[Any]
