"""What a stream of batches reports, and to whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from fastedit.records.edit import EditSet, Problem


class BatchRejected(RuntimeError):
    """A batch could not be written; its trial was rolled back bit for bit. `case_ids` are the edits to blame."""

    def __init__(self, batch: int, case_ids: list[Any], reason: str) -> None:
        shown = ", ".join(str(case) for case in case_ids[:5]) + (", ..." if len(case_ids) > 5 else "")
        super().__init__(f"batch {batch} rolled back, no weight changed: {reason} (case ids {shown})")
        self.batch, self.case_ids, self.reason = batch, case_ids, reason


@dataclass(frozen=True)
class BatchReport:
    """What happened to one batch. loss: mean over its edits at the last forward, None where none is taken; steps: mean
    Adam steps; written: edits written in each round; neurons, norms: per layer, neurons written last and summed update
    norms; error: why it was rolled back, or None when it was committed; token_budget: rows optimised together, where
    the method has a bound; notes: what was warned of on the way; measured: by the guard."""

    batch: int
    case_ids: tuple[Any, ...]
    seconds: float
    loss: float | None = None
    steps: float | None = None
    written: tuple[int, ...] = ()
    neurons: Mapping[int, int] = field(default_factory=dict)
    norms: Mapping[int, float] = field(default_factory=dict)
    error: str | None = None
    token_budget: int | None = None
    notes: tuple[str, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_record(cls, plain: Mapping[str, Any]) -> BatchReport:
        """The report that a run directory holds as plain data."""
        layers = {name: {int(layer): each for layer, each in plain[name].items()} for name in ("neurons", "norms")}
        lists = {name: tuple(plain[name]) for name in ("case_ids", "written", "notes")}
        # NaN and infinities stand there as text.
        loss = plain["loss"] if plain["loss"] is None else float(plain["loss"])
        measured = {name: float(each) for name, each in plain["measured"].items()}
        return cls(**{**plain, **layers, **lists, "loss": loss, "measured": measured})


@dataclass(frozen=True)
class Run:
    """One call of `Editor.edit`: the edits that were committed, a report per batch, and why edits were left out."""

    edits: EditSet
    batches: tuple[BatchReport, ...]
    skipped: tuple[Problem, ...] = ()

    @property
    def seconds(self) -> float:
        """Wall time of all batches."""
        return sum(report.seconds for report in self.batches)

    @property
    def seconds_per_edit(self) -> float:
        """Wall time per committed edit."""
        return self.seconds / max(1, len(self.edits))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "n_edits": len(self.edits),
            "seconds": self.seconds,
            "seconds_per_edit": self.seconds_per_edit,
            "batches": [asdict(report) for report in self.batches],
            "skipped": [asdict(problem) for problem in self.skipped],
        }


class Watcher(Protocol):
    """What looks at a stream of batches from outside; see :class:`fastedit.editing.watch.Watch`."""

    def begin(self) -> None:
        """Called before the first batch."""
        ...

    def after_batch(self, report: BatchReport, last: bool) -> None:
        """Called after a batch was committed or rolled back; `last`: no other follows."""
        ...
