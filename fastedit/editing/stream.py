"""A stream of batches: each is written inside a trial, judged by the guard, recorded, and committed, or rolled back.

`Stream` alone attaches run directories, resumes and restores from them, and commits.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastedit.config import EditConfig
from fastedit.editing.committed import CommittedBatches
from fastedit.editing.guard import Guard, GuardTripped
from fastedit.editing.outcome import missed_edits
from fastedit.editing.retry import with_less_memory
from fastedit.methods.base import AnyMethod, AnyStart, AnyState, Progress, Result, Start, check_result
from fastedit.methods.closed_form.solver import NotPositiveDefinite
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.records.edit import Edit, EditSet
from fastedit.runs.log import Record, RunError, check_new, is_run
from fastedit.runs.recorder import Recorder, Settings, describe_run
from fastedit.runs.reports import BatchRejected, BatchReport, Missed, Watcher
from fastedit.runs.streams import Plan
from fastedit.runtime.free_memory import give_back_freed
from fastedit.runtime.interrupts import Interrupts
from fastedit.runtime.progress import Show, track
from fastedit.runtime.warnings_log import Notes
from fastedit.runtime.words import counted
from fastedit.weights.apply import RejectedUpdate
from fastedit.weights.editable import ColumnWeights, EditableWeights
from fastedit.weights.trial import Trial

log = logging.getLogger(__name__)

# Methods of the editor that bring the weights back at the end of a `with` block.
Block = Literal["temporarily", "unedited"]
OnError = Literal["stop", "skip"]


class EditorBusy(RuntimeError):
    """Another thread is editing with this editor."""


@dataclass(frozen=True)
class Rewrite:
    """How a recorded batch is written again without some of its edits.

    record: of the batch that is replaced
    known: rows of its values, by name, for the edits that remain; None where the method starts anew
    """

    record: Record
    known: Mapping[str, Tensor] | None


class Stream:
    """Everything that changes while an editor edits: weights, state, committed batches, run directory.

    config may be replaced between streams; the other arguments are those of `Editor`.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        method: AnyMethod,
        config: EditConfig,
        moments: Mapping[int, Tensor] | Source | None,
        seed: int,
        undo_depth: int,
        progress: Show,
    ) -> None:
        self.adapter = adapter
        self.method = method
        self.config = config
        self.moments = moments
        self.seed = seed
        self.undo_depth = undo_depth
        self.progress = progress

        layers = method.layers(adapter, config)
        self.weights = ColumnWeights(adapter, layers) if method.by_column else EditableWeights(adapter, layers)
        self.committed = CommittedBatches(undo_depth)
        self.recorder: Recorder | None = None
        self._state: AnyState | None = None
        # Stays halved for the rest of the stream once memory ran out: other groups would round differently.
        self._token_budget: int | None = None
        self._turn = threading.RLock()
        # The blocks of the editor that are open, the innermost last.
        self._blocks: list[Block] = []

    def __getstate__(self) -> dict[str, Any]:
        """All but the lock: a copy gets one of its own."""
        return {name: value for name, value in vars(self).items() if name != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._turn = threading.RLock()

    @property
    def start(self) -> AnyStart:
        """What the method is given, with the current settings."""
        return Start(self.adapter, self.weights, self.config, self.moments, self.seed, self.progress)

    @property
    def state(self) -> AnyState:
        """The method's state, prepared at first use, which can take minutes."""
        if self._state is None:
            state = self.method.prepare(self.start)
            if self.recorder is not None:
                self._adopt(state, self.recorder)
                self.recorder.replay_state(state, len(self.committed))
            self._state = state
        return self._state

    @property
    def edits(self) -> EditSet:
        """All edits in force, in the order in which they were written."""
        return EditSet(tuple(edit for batch in self.committed for edit in batch))

    def write(
        self,
        batches: Sequence[EditSet],
        batch_size: int,
        on_error: OnError,
        watchers: Sequence[Watcher],
        guard: Guard,
        run_dir: str | Path | None,
        resume: bool,
        verify: bool,
    ) -> tuple[list[BatchReport], list[Edit], tuple[Missed, ...] | None]:
        """Write batches, or with `resume` what of them the run directory lacks, see `runs.streams`.

        verify: look at every committed edit after the last batch
        Returns the reports, the committed edits, and those of them that did not take (None without `verify`).
        Raises BatchRejected, RunError, WeightsChanged, EditorBusy, and KeyboardInterrupt after a Ctrl-C."""
        with self._alone(), self._recording(run_dir, resume) as recorder:
            plan = Plan(batches, range(len(batches)))
            if recorder is not None:
                plan = recorder.plan(batches, batch_size, resume)

            reports, committed = list(plan.reports), list(plan.committed)
            about = {"batch_size": batch_size, "on_error": on_error}
            for report in self._write_from(plan, about, watchers, guard):
                reports.append(report)
                if report.error is None:
                    committed.extend(plan.batches[report.batch])

            missed = None
            if verify:
                missed = missed_edits(self.adapter, committed, reports, self.progress)
                if recorder is not None:
                    recorder.record_outcome(len(committed), [asdict(edit) for edit in missed])

        return reports, committed, missed

    def write_batch(
        self,
        number: int,
        batch: EditSet,
        guard: Guard,
        progress: Progress | None = None,
        token_budget: int | None = None,
        rewrite: Rewrite | None = None,
    ) -> BatchReport:
        """Write one batch inside a trial, judge it, record it and commit it; its report.

        token_budget: in place of the config's
        rewrite: the batch was recorded before; its new record stays pending until a rewind names it
        Raises RejectedUpdate, NotPositiveDefinite or GuardTripped; WeightsChanged where something else wrote into the
        model since the last write; ValueError for a result that does not fit the batch. Whatever is raised, by the
        method too, weights, state and the batches of the run are as before."""
        started = time.perf_counter()
        state, trial = self.state, Trial(self.weights)

        def attempt(budget: int | None) -> tuple[Result, dict[str, float]]:
            trial.rollback()
            start = replace(self.start, config=self.method.with_token_budget(self.config, budget))
            known = None if rewrite is None else rewrite.known
            result = self.method.write_batch(start, state, batch, trial, progress, known)
            check_result(self.method.name, result, len(batch))
            return result, guard.check(self.adapter, self.weights, trial.touched)

        with self.weights.writing(), Notes() as notes, trial, torch.no_grad():
            budget = self.method.token_budget(self.config) if token_budget is None else token_budget
            (result, measured), budget = with_less_memory(attempt, budget)

            report = BatchReport(
                batch=number,
                case_ids=tuple(edit.case_id for edit in batch),
                seconds=time.perf_counter() - started,
                loss=None if bool(result.losses.isnan().all()) else float(result.losses.mean()),
                steps=float(result.steps.float().mean()),
                written=tuple(result.written),
                neurons=dict(result.neurons),
                norms=dict(result.norms),
                token_budget=budget,
                notes=tuple(notes.lines),
                measured=measured,
                unwritten=tuple(
                    edit.case_id for edit, written in zip(batch, result.is_written.tolist(), strict=True) if not written
                ),
            )
            self._commit(report, batch, trial, result, rewrite)

        return report

    def _commit(
        self, report: BatchReport, batch: EditSet, trial: Trial, result: Result, rewrite: Rewrite | None
    ) -> None:
        """Record a batch and bring it into force. Nothing of it is in force when this raises."""
        recorder, state = self.recorder, self.state
        kept = state.kept(result)
        if recorder is not None:
            replaced = None if rewrite is None else rewrite.record
            recorder.commit(report.batch, batch, trial, kept, result.tensors(), asdict(report), replaced)

        try:
            self.committed.append(batch, trial, state, kept)
        except BaseException:
            # A pending record is in force only when a rewind names it.
            if recorder is not None and rewrite is None:
                recorder.rewind(len(recorder.live) - 1)
            raise

    def undo(self, n_batches: int) -> None:
        """Take the last batches back, weights and state, bit for bit.

        Those in memory are rolled back, older ones rebuilt from the run directory. Raises ValueError for more, and
        WeightsChanged where something else wrote into the model since the last write."""
        count = len(self.committed)
        available = self.committed.undoable if self.recorder is None else count
        if not 1 <= n_batches <= count or n_batches > available:
            batches = counted(available, "batch is", "batches are")
            raise ValueError(f"undo: {batches} in memory or recorded, asked for {n_batches}")

        with self._alone(), self.weights.writing():
            if self.recorder is not None:
                with self.recorder.log.writing():
                    self.recorder.rewind(count - n_batches)

            if n_batches > self.committed.undoable:
                self.restore(count - n_batches)
            else:
                self.committed.undo(n_batches, self.state)

    def attach(self, recorder: Recorder, prepare: bool = False) -> None:
        """Take over a recorded run: its batches are written into the model, which must be unedited.

        prepare: make the state first, so that a run with another one is refused with nothing written
        Raises RunError, WrongModel, DamagedRun or WeightsChanged."""
        self.weights.check_untouched()
        if self.committed:
            batches = counted(len(self.committed), "batch", "batches")
            raise RunError(f"resume: wanted an editor without edits, got one with {batches}")

        recorder.check(self.adapter, self.weights, self._settings())
        if prepare or self._state is not None:
            self._adopt(self.state, recorder)

        self.recorder = recorder
        self._token_budget = recorder.token_budget
        self.restore(len(recorder.live))

    def restore(self, keep: int) -> None:
        """Rebuild weights, state and committed batches as after the first `keep` live batches of the run directory."""
        recorder = self.recorder
        if recorder is None:
            raise RunError("restore: wanted an editor with a run directory, got one without")

        with self.weights.writing():
            recorder.replay_weights(self.weights, keep)
        if self._state is not None:
            recorder.replay_state(self._state, keep)
        self.committed = self._committed_before(recorder.edits(record) for record in recorder.live[:keep])

    @contextlib.contextmanager
    def temporarily(self) -> Iterator[None]:
        """Inside the block nothing is recorded; after it weights, state and batches are bit for bit as before it.

        Raises WeightsChanged, and leaves the weights as they are, where something else wrote into the model."""
        with self._alone():
            yield from self._put_back()

    def _put_back(self) -> Iterator[None]:
        """`temporarily`, for the thread whose turn it is."""
        state = {name: tensor.clone() for name, tensor in self.state.tensors().items()}
        changed = {layer: self.weights.changed(layer) for layer in self.weights.layers}
        columns = {layer: self.weights.stored(layer, index) for layer, index in changed.items()}
        outside = self.committed, self.recorder, self._token_budget

        self.committed, self.recorder = self._committed_before(self.committed), None
        try:
            yield
        finally:
            self.state.load(state)
            self.committed, self.recorder, self._token_budget = outside

            with self.weights.writing():
                self.weights.reset()
                for layer, index in changed.items():
                    self.weights.put(layer, index, columns[layer])

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Around what edits or swaps weights: no other thread does.

        Raises EditorBusy, since batches of two threads would build on each other's half-written state."""
        if not self._turn.acquire(blocking=False):
            raise EditorBusy(
                "another thread is editing with this editor; wait for it, or give each thread its own model"
            )

        try:
            yield
        finally:
            self._turn.release()

    @contextlib.contextmanager
    def block(self, name: Block) -> Iterator[None]:
        """Around the body of a block of the editor, by the name of its method."""
        self._blocks.append(name)
        try:
            yield
        finally:
            self._blocks.remove(name)

    def check_block(self, what: str, *names: Block) -> None:
        """Raise ValueError if `what` is asked for inside one of these blocks, at whose end it would be lost."""
        for name in names:
            if name in self._blocks:
                raise ValueError(
                    f"{what}: not inside `{name}`, whose end brings the weights of before back; leave it first"
                )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """As `turn`, for what edits: nothing else wrote into the model. Raises EditorBusy or WeightsChanged."""
        with self.turn():
            self.weights.check_untouched()
            yield

    def _committed_before(self, batches: Iterable[EditSet]) -> CommittedBatches:
        """Batches in force that were not written here, so that memory cannot undo them."""
        return CommittedBatches(self.undo_depth, batches)

    def _adopt(self, state: AnyState, recorder: Recorder) -> None:
        """Take over what the run prepared. Raises RunError where it was prepared from something else."""
        try:
            state.adopt(recorder.header["prepared"])
        except ValueError as error:
            folder = recorder.log.folder
            again = f"Editor.resume({str(folder)!r}, moments=...)"
            hint = f"; tensors that were given are given again in Python, {again}, whose forget and edit then work"
            raise RunError(f"{folder}: {error}{hint if self.method.uses_second_moments else ''}") from error

    def _settings(self) -> Settings:
        return {"method": self.method.name, "config": self.config, "seed": self.seed}

    @contextlib.contextmanager
    def _recording(self, run_dir: str | Path | None, resume: bool) -> Iterator[Recorder | None]:
        """The recorder of the run directory, locked for writing; None when nothing is recorded."""
        if resume and run_dir is None and self.recorder is None:
            raise ValueError("resume: wanted run_dir, the folder of the run to go on with")

        if run_dir is not None:
            self._open(Path(run_dir), resume)

        with contextlib.nullcontext() if self.recorder is None else self.recorder.log.writing():
            yield self.recorder

    def _open(self, run_dir: Path, resume: bool) -> None:
        """Create the run directory or attach the run in it; nothing to do when it is the one attached already."""
        if self.recorder is not None:
            folder = self.recorder.log.folder
            if run_dir.resolve() != folder.resolve():
                raise RunError(f"run_dir: this editor is recorded in {folder}, got {run_dir}")
            return

        if not resume:
            check_new(run_dir)
        if is_run(run_dir):
            self.attach(Recorder.open(run_dir), prepare=True)
            return

        if self.committed:
            batches = counted(len(self.committed), "batch was", "batches were")
            raise RunError(f"run_dir: {batches} written before anything was recorded")
        header = describe_run(self.adapter, self.weights, self._settings(), self.state.describe(), self.moments)
        self.recorder = Recorder.create(run_dir, header)

    def _write_from(
        self, plan: Plan, about: Mapping[str, Any], watchers: Sequence[Watcher], guard: Guard
    ) -> Iterator[BatchReport]:
        """Write the batches of a plan that are not behind the run; a report of each.

        about: batch_size and on_error, for the record of a new stream"""
        first, batches, state = len(plan.reports), plan.batches, self.state
        guard.begin(self.adapter, self.weights)
        for watcher in watchers:
            watcher.begin()

        n_edits = sum(map(len, batches[first:]))
        label = f"editing ({self.method.name})"
        with track(n_edits, label, "edits", self.progress) as advance, Interrupts() as interrupts:

            def progress(n: float) -> None:
                interrupts.check()
                advance(n)

            for number, batch in enumerate(batches[first:], first):
                if self.recorder is not None and number == plan.opens:
                    self.recorder.begin(batches[number:], about)

                in_stream = plan.numbers[number]
                report = self._try_batch(in_stream, batch, guard, progress).numbered(number)
                if report.error is not None:
                    self._reject(report, in_stream, about["on_error"])
                elif self.recorder is not None:
                    self.recorder.snapshot_if_due(self.weights, state)

                yield report
                for watcher in watchers:
                    watcher.after_batch(report, last=number + 1 == len(batches))
                if interrupts.stop_requested:
                    raise KeyboardInterrupt

    def _try_batch(self, number: int, batch: EditSet, guard: Guard, progress: Progress) -> BatchReport:
        """Write one batch; a batch that cannot be written gives a report with an error."""
        started = time.perf_counter()
        case_ids = tuple(edit.case_id for edit in batch)

        with Notes() as notes:
            try:
                report = self.write_batch(number, batch, guard, progress, self._token_budget)
                self._token_budget = report.token_budget
            except RejectedUpdate as error:
                # A method of the user's own may name rows that the batch does not have.
                blamed = tuple(case_ids[row] for row in error.rows if 0 <= row < len(batch)) or case_ids
                report = BatchReport(batch=number, case_ids=blamed, seconds=0.0, error=str(error))
            except (NotPositiveDefinite, GuardTripped) as error:
                report = BatchReport(batch=number, case_ids=case_ids, seconds=0.0, error=str(error))

        give_back_freed()
        return replace(report, seconds=time.perf_counter() - started, notes=tuple(notes.lines))

    def _reject(self, report: BatchReport, in_stream: int, on_error: OnError) -> None:
        """Record a batch that was rolled back. Raises BatchRejected where the call is to stop.

        in_stream: its number in its stream of the run"""
        if self.recorder is not None:
            plain = asdict(report.numbered(in_stream))
            self.recorder.reject(in_stream, plain, skipped=on_error == "skip")
        if on_error == "stop":
            raise BatchRejected(report.batch, list(report.case_ids), str(report.error))

        log.warning("batch %d skipped: %s", report.batch, report.error)
