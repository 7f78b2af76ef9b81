"""Reports of a stream of batches, and the interface of those who watch it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

from fastedit.records.edit import CaseId, EditSet, Problem


class BatchRejected(RuntimeError):
    """A batch could not be written; its trial was rolled back bit for bit. `case_ids` are the edits to blame."""

    def __init__(self, batch: int, case_ids: list[CaseId], reason: str) -> None:
        shown = ", ".join(str(case) for case in case_ids[:5]) + (", ..." if len(case_ids) > 5 else "")
        super().__init__(f"batch {batch} rolled back, no weight changed: {reason} (case ids {shown})")

        self.batch = batch
        self.case_ids = case_ids
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """What happened to one batch.

    batch: its number in the stream, from 0
    case_ids: of its edits, or of those to blame when it was rolled back
    seconds: wall time
    loss: mean over its edits at the last forward; None for a method without one
    steps: mean number of Adam steps
    written: edits written in each round
    neurons: layer -> neurons written in the last round
    norms: layer -> summed norms of the updates
    error: why it was rolled back; None when it was committed
    token_budget: rows optimised together; None for a method without a bound
    notes: warnings given while it was written
    measured: what the guard measured
    """

    batch: int
    case_ids: tuple[CaseId, ...]
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
        """The report in a run's record. A field that the run lacks has its default; an unknown one is left out: no
        result depends on a report."""
        known = {attribute.name for attribute in fields(cls)}
        values = {name: value for name, value in plain.items() if name in known}

        for name in values.keys() & {"case_ids", "written", "notes"}:
            values[name] = tuple(plain[name])
        for name in values.keys() & {"neurons", "norms"}:
            values[name] = {int(layer): value for layer, value in plain[name].items()}

        # JSON has no NaN and no infinities: they are text in a record.
        if values.get("loss") is not None:
            values["loss"] = float(values["loss"])
        values["measured"] = {name: float(value) for name, value in plain.get("measured", {}).items()}
        return cls(**values)


@dataclass(frozen=True, repr=False)
class Run:
    """The result of one call of `Editor.edit`.

    edits: those that were committed
    batches: a report per batch
    skipped: why records were left out
    """

    edits: EditSet
    batches: tuple[BatchReport, ...]
    skipped: tuple[Problem, ...] = ()

    def __repr__(self) -> str:
        rejected = sum(report.error is not None for report in self.batches)
        parts = [f"{len(self.edits)} edits", f"{len(self.batches)} batches"]

        if rejected:
            parts.append(f"{rejected} rejected")
        if self.skipped:
            parts.append(f"{len(self.skipped)} problems")
        return f"Run({', '.join(parts)}, {self.seconds:.1f} s)"

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
    """Follows a stream of batches; see :class:`fastedit.editing.watch.Watch`."""

    def begin(self) -> None:
        """Called before the first batch."""
        ...

    def after_batch(self, report: BatchReport, last: bool) -> None:
        """Called after a batch was committed or rolled back. last: no other follows."""
        ...
