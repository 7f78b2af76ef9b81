"""Reports of a stream of batches, and the interface of those who watch it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from fastedit.records.edit import CaseId, EditSet, Problem
from fastedit.runtime.words import counted


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
    unwritten: edits that no round wrote, because their residual was out of bounds
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
    unwritten: tuple[CaseId, ...] = ()

    def numbered(self, batch: int) -> BatchReport:
        """The report with another number of its batch."""
        return replace(self, batch=batch)

    @classmethod
    def from_record(cls, plain: Mapping[str, Any]) -> BatchReport:
        """The report in a run's record. A field that the run lacks has its default; an unknown one is left out: no
        result depends on a report."""
        known = {attribute.name for attribute in fields(cls)}
        values = {name: value for name, value in plain.items() if name in known}

        for name in values.keys() & {"case_ids", "written", "notes", "unwritten"}:
            values[name] = tuple(plain[name])
        for name in values.keys() & {"neurons", "norms"}:
            values[name] = {int(layer): value for layer, value in plain[name].items()}

        # JSON has no NaN and no infinities: they are text in a record.
        if values.get("loss") is not None:
            values["loss"] = float(values["loss"])
        values["measured"] = {name: float(value) for name, value in plain.get("measured", {}).items()}
        return cls(**values)


@dataclass(frozen=True)
class Missed:
    """An edit that did not take: after the bare prompt, some token of its target does not rank first.

    wanted: its target; got: the tokens that rank first in the target's places, as text
    written: whether an update was written for it
    """

    case_id: CaseId
    prompt: str
    wanted: str
    got: str
    written: bool

    def __str__(self) -> str:
        why = "" if self.written else " (nothing was written for it)"
        return f"case {self.case_id}: {self.prompt!r} wanted {self.wanted!r}, got {self.got!r}{why}"


@dataclass(frozen=True, repr=False)
class Run:
    """The result of one call of `Editor.edit`.

    edits: those that were committed
    batches: a report per batch
    skipped: why records were left out
    missed: the committed edits that did not take, after the last batch; None when they were not looked at
    """

    edits: EditSet
    batches: tuple[BatchReport, ...]
    skipped: tuple[Problem, ...] = ()
    missed: tuple[Missed, ...] | None = None

    def __repr__(self) -> str:
        rejected = sum(report.error is not None for report in self.batches)
        parts = [counted(len(self.edits), "edit"), counted(len(self.batches), "batch", "batches")]

        if rejected:
            parts.append(f"{rejected} rejected")
        if self.skipped:
            parts.append(counted(len(self.skipped), "problem"))
        if self.missed is not None:
            parts.insert(1, f"{self.taken} taken")
        return f"Run({', '.join(parts)}, {self.seconds:.1f} s)"

    @property
    def written(self) -> int:
        """Number of committed edits for which an update was written."""
        unwritten = {case_id for report in self.batches for case_id in report.unwritten}
        return sum(edit.case_id not in unwritten for edit in self.edits)

    @property
    def taken(self) -> int | None:
        """Number of committed edits that took; None when they were not looked at."""
        return None if self.missed is None else len(self.edits) - len(self.missed)

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
            "written": self.written,
            "taken": self.taken,
            "missed": None if self.missed is None else [asdict(each) for each in self.missed],
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
