"""What a call of `Editor.edit` goes on with: its edits beside those of the streams that a run holds already.

A stream's record names how many batches of which edits a call was given. Its tensors are `edits`, the SHA-256 of every
edit, (n_edits, 32) uint8, and `batches`, the number of edits in each batch, (n_batches,) int64. Runs of fastedit 0.1.0
hold neither, only one hash over both.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fastedit.records.edit import Edit, EditSet
from fastedit.runs.fields import recorded
from fastedit.runs.log import DamagedRun, Record, RunError, RunLog
from fastedit.runs.reports import BatchReport
from fastedit.runtime.hashing import canonical
from fastedit.runtime.words import counted

log = logging.getLogger(__name__)

# Number of a stream's batch -> the record of what became of it.
Reached = Mapping[int, Record]


@dataclass(frozen=True)
class Plan:
    """What a call of `Editor.edit` writes.

    batches: all of its edits, cut as they are written
    numbers: the number of each batch in its stream of the run
    reports: of the batches that are behind the run already, the first ones
    committed: the edits of these that are in force
    opens: number of the batch before which the record of a new stream is due; None = no new stream
    """

    batches: Sequence[EditSet]
    numbers: Sequence[int]
    reports: Sequence[BatchReport] = ()
    committed: Sequence[Edit] = ()
    opens: int | None = None


@dataclass(frozen=True)
class _Behind:
    """A batch of a stream that is behind the run.

    in_force, others: its edits
    was_written: or else it was skipped
    """

    report: BatchReport
    in_force: Sequence[Edit]
    others: Sequence[Edit]
    was_written: bool


def edit_hash(edit: Edit) -> str:
    """SHA-256 of an edit's fields, those left out that have the value from before they were added."""
    return hashlib.sha256(canonical(recorded(edit)).encode()).hexdigest()


def stream_hash(batches: Sequence[Sequence[Edit]]) -> str:
    """SHA-256 over all edits and the batches they are in."""
    return _hash_of([[edit_hash(edit) for edit in batch] for batch in batches])


def describe_stream(batches: Sequence[EditSet]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Body and tensors of a stream's record."""
    hashes = [[edit_hash(edit) for edit in batch] for batch in batches]
    rows = b"".join(bytes.fromhex(digest) for batch in hashes for digest in batch)
    tensors = {
        "edits": torch.frombuffer(bytearray(rows), dtype=torch.uint8).view(-1, 32),
        "batches": torch.tensor([len(batch) for batch in batches]),
    }
    return {"edits_sha256": _hash_of(hashes), "n_batches": len(batches)}, tensors


class Streams:
    """The streams of a run.

    reached: what became of the batches of a stream so far, by its record
    """

    def __init__(self, runlog: RunLog, reached: Callable[[Record], Reached], live: Sequence[Record]) -> None:
        self._log = runlog
        self._reached = reached
        self._records = [record for record in runlog.records if record.kind == "stream"]
        self._in_force = {edit["sha256"] for record in live for edit in record.body["edits"]}

    def resumed(self, batches: Sequence[EditSet], batch_size: int) -> Plan:
        """Go on with the streams that these edits begin with; what follows in them becomes a new stream. Edits that
        were taken back are written again only when none of the edits is in force.

        Raises RunError for other edits while the last stream is unfinished, and for edits that the run holds among
        others; each names the first edit that is to blame."""
        edits = [edit for batch in batches for edit in batch]
        hashes = [edit_hash(edit) for edit in edits]

        records, cut = self._known(batches, hashes)
        is_again = self._is_taken_back(records, hashes)
        if cut and not is_again:
            return self._goes_on(records, cut, batches, batch_size)

        if self._records and self._is_unfinished(self._records[-1]):
            raise RunError(self._why_others(self._records[-1], edits, hashes))
        self._refuse_repeated(edits, hashes)
        if is_again:
            log.warning(
                "%s: these edits were taken back and none is in force; %s written, as a stream of their own",
                self._log.folder,
                counted(len(edits), "edit is", "edits are"),
            )
        return Plan(batches, range(len(batches)), opens=0)

    def _known(self, batches: Sequence[EditSet], hashes: Sequence[str]) -> tuple[Sequence[Record], list[list[int]]]:
        """The streams that the edits begin with, and the sizes of their batches.

        Where several fit, those that hold most of the edits, and of these the last: it may be unfinished."""
        best: tuple[Sequence[Record], list[list[int]]] = ((), [])
        for first in range(len(self._records)):
            cut = self._cut(self._records[first:], batches, hashes)
            if cut and sum(map(sum, cut)) >= sum(map(sum, best[1])):
                best = self._records[first : first + len(cut)], cut
        return best

    def _is_taken_back(self, records: Sequence[Record], hashes: Sequence[str]) -> bool:
        """Whether these streams are finished and were written, but none of the edits is in force now."""
        if any(digest in self._in_force for digest in hashes) or any(map(self._is_unfinished, records)):
            return False
        return any(batch.kind == "batch" for record in records for batch in self._reached(record).values())

    def _cut(
        self, records: Sequence[Record], batches: Sequence[EditSet], hashes: Sequence[str]
    ) -> list[list[int]] | None:
        """Sizes of the batches of each of these streams, as far as the edits reach; None when the edits are others."""
        cut: list[list[int]] = []
        place = 0
        for record in records:
            if place == len(hashes):
                break
            # Only the last stream of a run is gone on with.
            if cut and self._is_unfinished(records[len(cut) - 1]):
                return None

            sizes = self._sizes(record, hashes[place:], batches if place == 0 else ())
            if sizes is None:
                return None
            cut.append(sizes)
            place += sum(sizes)

        is_last = len(cut) == len(records)
        return cut if is_last or not self._is_unfinished(records[len(cut) - 1]) else None

    def _sizes(self, record: Record, hashes: Sequence[str], batches: Sequence[EditSet]) -> list[int] | None:
        """Sizes of a stream's batches, when the edits begin with its own; `batches`: them, cut as they were given."""
        given = self._given(record)
        if given is not None:
            sizes, own = given
            return sizes if list(hashes[: len(own)]) == own else None

        # Only one hash is known: it is tried for every way in which the stream may have been cut.
        if batches and stream_hash(batches) == record.body["edits_sha256"]:
            return [len(batch) for batch in batches]
        size, n_batches = record.body["batch_size"], record.body["n_batches"]
        for last in range(1, size + 1):
            sizes = [size] * (n_batches - 1) + [last]
            if sum(sizes) <= len(hashes) and _hash_of(_parts(hashes, sizes)) == record.body["edits_sha256"]:
                return sizes
        return None

    def _given(self, record: Record) -> tuple[list[int], list[str]] | None:
        """Sizes of a stream's batches and the hashes of its edits; None for a run that does not hold them."""
        try:
            tensors = self._log.tensors(record.number)
        except DamagedRun:
            return None
        if "edits" not in tensors:
            return None
        return tensors["batches"].tolist(), [row.numpy().tobytes().hex() for row in tensors["edits"]]

    def _is_unfinished(self, record: Record) -> bool:
        return len(self._reached(record)) < record.body["n_batches"]

    def _goes_on(
        self, records: Sequence[Record], cut: list[list[int]], batches: Sequence[EditSet], batch_size: int
    ) -> Plan:
        """The plan that finishes these streams, cut like this, and goes on with what follows."""
        edits = EditSet(tuple(edit for batch in batches for edit in batch))
        old = [edits[start:end] for start, end in pairwise([0, *accumulate(size for sizes in cut for size in sizes)])]
        rest = _without_first(batches, sum(map(len, old)))
        numbers = [number for sizes in cut for number in range(len(sizes))]
        behind = self._behind(records, old)

        last = records[-1]
        is_same_cut = batch_size == last.body["batch_size"] or [*map(len, batches)] == [*map(len, old)]
        if len(behind) < len(old) and not is_same_cut:
            raise RunError(
                f"{self._stopped(last)}; got its edits in batches of another size, {batch_size}; resume it with"
                f" batches of {last.body['batch_size']} (batch_size=, --batch-size)"
            )

        self._refuse_repeated_behind(rest)
        self._tell(old, behind, sum(map(len, rest)))

        committed = [edit for part in behind for edit in part.in_force]
        reports = [part.report for part in behind]
        return Plan([*old, *rest], [*numbers, *range(len(rest))], reports, committed, opens=len(old) if rest else None)

    def _behind(self, records: Sequence[Record], batches: Sequence[EditSet]) -> list[_Behind]:
        """What became of the batches of these streams so far, numbered from the first one."""
        behind: list[_Behind] = []
        first = 0
        for record in records:
            reached = self._reached(record)
            for number in sorted(reached):
                report = BatchReport.from_record(reached[number].body["report"]).numbered(first + number)
                in_force, others = self._parted(batches[report.batch])
                behind.append(_Behind(report, in_force, others, was_written=reached[number].kind == "batch"))
            first += record.body["n_batches"]
        return behind

    def _parted(self, edits: Iterable[Edit]) -> tuple[list[Edit], list[Edit]]:
        """The edits that are in force, and the others."""
        in_force: list[Edit] = []
        others: list[Edit] = []
        for edit in edits:
            (in_force if edit_hash(edit) in self._in_force else others).append(edit)
        return in_force, others

    def _refuse_repeated_behind(self, rest: Sequence[EditSet]) -> None:
        """Raise RunError for edits behind those of the streams that are in force: they would be written once more."""
        repeated, others = self._parted(edit for batch in rest for edit in batch)
        if repeated:
            count = len(repeated) + len(others)
            raise RunError(
                f"{self._log.folder}: {len(repeated)} of the {counted(count, 'edit')} behind those of the run"
                f" {'is' if len(repeated) == 1 else 'are'} in force already (case_id {repeated[0].case_id!r} first);"
                " leave out those in force"
            )

    def _tell(self, old: Sequence[EditSet], behind: Sequence[_Behind], n_new: int) -> None:
        """Warn of edits that are not simply those of an unfinished stream."""
        n_left = len(old) - len(behind)
        new = f"the {counted(n_new, 'edit')} that follow"
        not_in_force = _not_in_force(behind)

        if n_left:
            known = f"{counted(len(old), 'batch', 'batches')} with {counted(sum(map(len, old)), 'edit')} began"
            left = counted(n_left, "batch is", "batches are")
            told = f"{known}; {left} left and written first, then {new}, which are new" if n_new else ""
            told = told or (f"{known}; {left} left" if not_in_force else "")
        else:
            n_batches = sum(bool(part.in_force) for part in behind)
            n_edits = sum(len(part.in_force) for part in behind)
            known = f"{counted(n_batches, 'batch', 'batches')} with {counted(n_edits, 'edit')}"
            told = f"{known} {'is' if n_batches == 1 else 'are'} written already; "
            told += f"going on with {new}" if n_new else "nothing to do"

        if told:
            log.warning("%s: %s%s", self._log.folder, told, not_in_force)

    def _stopped(self, record: Record) -> str:
        return f"{self._log.folder}: stopped before batch {len(self._reached(record))} of {record.body['n_batches']}"

    def _why_others(self, record: Record, edits: Sequence[Edit], hashes: Sequence[str]) -> str:
        """Why edits do not go on with an unfinished stream: the first that differs."""
        stopped, hint = self._stopped(record), "resume it with the same edits; new ones may only follow them"
        given = self._given(record)
        # Of an older run, the edits of the batches so far.
        own = given[1] if given is not None else self._hashes_so_far(record)

        place = next((at for at, pair in enumerate(zip(hashes, own, strict=False)) if pair[0] != pair[1]), None)
        if place is not None:
            return f"{stopped}; edit {place + 1} (case_id {edits[place].case_id!r}) is another one than then; {hint}"
        if len(edits) < len(own):
            return f"{stopped}; got only the first {len(edits)} of its {len(own)} edits; {hint}"
        return f"{stopped}; these edits are others than then, from edit {len(own) + 1} on or later; {hint}"

    def _hashes_so_far(self, record: Record) -> list[str]:
        """Hashes of the edits of a stream's first batches, up to one that was rejected."""
        hashes: list[str] = []
        for _, batch in sorted(self._reached(record).items()):
            if batch.kind != "batch":
                break
            hashes += [edit["sha256"] for edit in batch.body["edits"]]
        return hashes

    def _refuse_repeated(self, edits: Sequence[Edit], hashes: Sequence[str]) -> None:
        """Raise RunError for edits that are in force: they would be written once more beside themselves."""
        repeated = [edit for edit, digest in zip(edits, hashes, strict=True) if digest in self._in_force]
        if not repeated:
            return

        new = [edit for edit, digest in zip(edits, hashes, strict=True) if digest not in self._in_force]
        first = repeated[0].case_id
        what = f"{self._log.folder}: {len(repeated)} of these {len(edits)} edits are in force (case_id {first!r} first)"
        if not new:
            raise RunError(f"{what}, none is new, and nothing was written again")
        raise RunError(
            f"{what}, but the edits do not begin with those of the run; give the new ones alone (case_id"
            f" {new[0].case_id!r} first), or behind all of the run's"
        )


def _not_in_force(behind: Sequence[_Behind]) -> str:
    """Which edits of these batches are not in force, to follow another part of a message; empty when all are."""
    taken = [edit for part in behind if part.was_written for edit in part.others]
    skipped = [edit for part in behind if not part.was_written for edit in part.others]

    told = ""
    if skipped:
        told += f"; {counted(len(skipped), 'edit was', 'edits were')} skipped (case_id {skipped[0].case_id!r} first)"
    if taken:
        were = counted(len(taken), "edit was taken back since and is", "edits were taken back since and are")
        it = (
            "it alone, without the others, to write it"
            if len(taken) == 1
            else "them alone, without the others, to write them"
        )
        told += f"; {were} not in force (case_id {taken[0].case_id!r} first): give {it} again"
    return told


def _without_first(batches: Sequence[EditSet], count: int) -> list[EditSet]:
    """The batches without their first `count` edits. None grows: two edits that exclude each other stay apart."""
    rest = []
    for batch in batches:
        part = batch[count:]
        count = max(0, count - len(batch))
        if len(part):
            rest.append(part)
    return rest


def _parts(items: Sequence[str], sizes: Sequence[int]) -> list[list[str]]:
    return [list(items[start:end]) for start, end in pairwise([0, *accumulate(sizes)])]


def _hash_of(hashes: Sequence[Sequence[str]]) -> str:
    return hashlib.sha256(canonical(hashes).encode()).hexdigest()
