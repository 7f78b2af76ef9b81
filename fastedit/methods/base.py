"""What the editor asks of a method: which weights it may write, what it prepares, how it writes one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.records.edit import Edit
from fastedit.weights.trial import Trial

if TYPE_CHECKING:
    from fastedit.weights.editable import EditableWeights


@dataclass(frozen=True)
class Start:
    """What an editor was made with.

    config: the method's config; moments, seed: as given to the editor, where a method needs them
    progress: True or False shows or hides progress bars, None as the terminal can
    """

    model: ModelAdapter
    weights: EditableWeights
    config: Any
    moments: Mapping[int, Tensor] | Source | None = None
    seed: int = 0
    progress: bool | None = None


class Result(Protocol):
    """What was done to one batch inside its trial."""

    @property
    def losses(self) -> Tensor:
        """(n_edits,) at the last forward."""
        ...

    @property
    def steps(self) -> Tensor:
        """(n_edits,) int64, Adam steps."""
        ...

    @property
    def written(self) -> list[int]:
        """Edits written in each round."""
        ...

    @property
    def neurons(self) -> dict[int, int]:
        """layer -> neurons written last."""
        ...

    @property
    def norms(self) -> dict[int, float]:
        """layer -> summed norms of the updates."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What writing some of these edits anew can start from, by name, a row per edit: `known` of `Method.run`."""
        ...


class State(Protocol):
    """What a method carries from batch to batch."""

    def kept(self, result: Any) -> dict[str, Tensor]:
        """What of a batch stays, by name, such as its keys; `take_in` takes it when the batch is committed."""
        ...

    def take_in(self, kept: Mapping[str, Tensor]) -> None:
        """Go on by one committed batch, of which this was kept."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that changes from batch to batch, by name; `take_in` may write into what is handed out."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Become what `tensors` returned, bit for bit; nothing = as before the first batch."""
        ...

    def describe(self) -> dict[str, Any]:
        """What was prepared, as plain data: itself where it is small, else its SHA-256."""
        ...

    def adopt(self, described: Mapping[str, Any]) -> None:
        """Go on where the state stood that `describe` told of. Raises ValueError where another was prepared here."""
        ...


class Method(Protocol):
    """A recipe, as the editor drives it."""

    @property
    def by_column(self) -> bool:
        """Whether it writes few columns of its layers, whose originals are then kept one by one."""
        ...

    @property
    def batch_size(self) -> int:
        """Edits that are written together where nobody says otherwise."""
        ...

    def layers(self, model: ModelAdapter, config: Any) -> tuple[int, ...]:
        """The layers that the method may write. Raises ValueError where config and model do not fit together."""
        ...

    def template_tokens(self, config: Any) -> int:
        """Tokens that stand around prompt and target in what the method runs."""
        ...

    def prepare(self, start: Start) -> Any:
        """Makes the method's State; can take a while."""
        ...

    def run(
        self,
        start: Start,
        state: Any,
        edits: Sequence[Edit],
        trial: Trial,
        progress: Callable[[float], None] | None = None,
        known: Mapping[str, Tensor] | None = None,
    ) -> Result:
        """Write one batch inside its trial. Raises RejectedUpdate or NotPositiveDefinite; the trial then rolls back.

        progress: called with the number of edits finished since the last call, also 0 where the batch may be abandoned
        known: rows of these edits in `Result.tensors` of an earlier write, or None"""
        ...


@dataclass
class NoState:
    """The state of a method in which a batch leaves nothing for the next."""

    def kept(self, result: Any) -> dict[str, Tensor]:
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
