"""The editor: drives a recipe over a stream of batches, each inside a trial that is committed or rolled back."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit.config import EditConfig
from fastedit.editing.committed import History
from fastedit.editing.guard import Guard, GuardTripped
from fastedit.editing.retry import token_budget, with_budget, with_less_memory
from fastedit.methods.base import Start
from fastedit.methods.closed_form.solver import NotPositiveDefinite
from fastedit.methods.presets import CONFIGS, load_preset, preset_for
from fastedit.methods.registry import RECIPES
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.model.families import FAMILIES, Family
from fastedit.model.load import load_model
from fastedit.model.tokens import encode
from fastedit.records.check import Checked, check_edits
from fastedit.records.edit import Edit, EditSet
from fastedit.runs.log import RunError, check_new, is_run
from fastedit.runs.recorder import Recorder, describe_run
from fastedit.runs.reports import BatchRejected, BatchReport, Run, Watcher
from fastedit.runtime.free_memory import give_back_freed
from fastedit.runtime.interrupts import Interrupts
from fastedit.runtime.progress import track
from fastedit.runtime.warnings_log import Notes
from fastedit.weights.apply import RejectedUpdate
from fastedit.weights.editable import ColumnWeights, EditableWeights
from fastedit.weights.trial import Journal

__all__ = ["BatchRejected", "BatchReport", "Editor", "Run", "Watcher"]

log = logging.getLogger(__name__)


class Editor:
    """Edits facts in a model, batch after batch. The model stays edited; `undo` goes back.

    model: an adapter, or make one with `Editor.from_pretrained` or `Editor.from_model`
    config: the method's config; default: the preset that was made for this model
    moments: layer -> second moment (d_ff, d_ff), or a Source of text; default: text sampled from the model
    seed: of the context templates and of sampled text
    """

    def __init__(
        self,
        model: ModelAdapter,
        method: str = "nse",
        config: EditConfig | None = None,
        moments: Mapping[int, Tensor] | Source | None = None,
        seed: int = 0,
        undo_depth: int = 3,
        progress: bool | None = None,
    ) -> None:
        if method not in RECIPES:
            hint = "; meg writes no weight and has an object of its own, fastedit.MeG" if method == "meg" else ""
            raise ValueError(f"method must be one of {', '.join(RECIPES)}, got {method!r}{hint}")
        self.model, self.method, self.seed, self.progress = model, method, seed, progress
        self.config = config or preset_for(method, model.n_layers, model.d_model, model.d_ff)
        if not isinstance(self.config, CONFIGS[method]):
            raise TypeError(f"{method} needs a {CONFIGS[method].__name__}, got {type(self.config).__name__}")
        self.recipe = RECIPES[method]
        layers = self.recipe.layers(model, self.config)
        self.weights = (ColumnWeights if self.recipe.by_column else EditableWeights)(model, layers)
        self.journal = Journal(self.weights, undo_depth)
        self._moments = moments
        self._state: Any = None
        self._history = History()
        self.recorder: Recorder | None = None
        self._token_budget: int | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        method: str = "nse",
        preset: str | None = None,
        dtype: str = "float32",
        device: str | Mapping[str, int | str] = "cpu",
        families: Sequence[Family] = FAMILIES,
        **options: Any,
    ) -> Editor:
        """Load `source` (alias, hub id, folder or GGUF file) and make an editor for it.

        preset: name of a shipped preset; default: the one made for this model
        dtype, device, families: see :func:`fastedit.model.load.load_model`
        options: those of `Editor`"""
        if preset is not None:
            options["config"] = load_preset(method, preset)
        return cls(load_model(source, dtype, device, families), method, **options)

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        method: str = "nse",
        families: Sequence[Family] = FAMILIES,
        **options: Any,
    ) -> Editor:
        """An editor for a model and tokenizer that are already loaded; the model is edited in place.

        families: rows to look the model up in, see :class:`fastedit.model.families.Family`
        options: those of `Editor`"""
        adapter = ModelAdapter(model, tokenizer, families)
        adapter.check_forward()
        return cls(adapter, method, **options)

    @classmethod
    def resume(cls, run_dir: str | Path, model: ModelAdapter | None = None, **options: Any) -> Editor:
        """The editor of a run directory with its batches written into the model, ready to go on.

        model: the unedited one; default: loaded from where the run says it was
        options: moments, undo_depth, progress, as for `Editor`
        Raises RunError: no run, damaged (DamagedRun), or of another model (WrongModel)."""
        recorder = Recorder.open(run_dir)
        method, config, seed, text = recorder.settings
        options = {"moments": Source(text, seed), "seed": seed, **options}
        editor = cls(model or recorder.load_model(), method, config, **options)
        editor._attach(recorder)
        return editor

    @property
    def start(self) -> Start:
        """What the method is given, with `config` as it is now."""
        return Start(self.model, self.weights, self.config, self._moments, self.seed, self.progress)

    @property
    def state(self) -> Any:
        """What the method prepares and carries on, such as second moments and past keys; made at first use, which can
        take a while. See :class:`fastedit.methods.base.State`."""
        if self._state is None:
            state = self.recipe.prepare(self.start)
            if self.recorder is not None:
                state.adopt(self.recorder.header["prepared"])
                self.recorder.replay_state(state, len(self._history))
            self._state = state
        return self._state

    @property
    def edits(self) -> EditSet:
        """All edits committed and not undone, in order."""
        return EditSet(tuple(edit for batch in self._history for edit in batch))

    def edit(
        self,
        edits: Sequence[Edit],
        batch_size: int | None = None,
        on_error: str = "stop",
        on_invalid: str = "refuse",
        watch: Watcher | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        guard: Guard | None = None,
    ) -> Run:
        """Write `edits` in batches.

        batch_size: default: the method's, 100 for closed forms
        on_error: what to do with a batch that cannot be written, or goes past the guard's bounds (it is rolled back
            first): "stop" raises BatchRejected, earlier batches stay; "skip" reports it and goes on
        on_invalid: what to do, before any weight is touched, with anything wrong in the edits: "refuse" raises
            InvalidEdits with all of it; "skip" leaves the wrong edits out, `Run.skipped` says why
        watch: told before the first batch and after each one; its time is not counted in the reports
        run_dir: folder of a run, where all that this editor does from then on is recorded. Raises RunError
        resume: go on with the run in that folder, or begin one
        guard: what batches are judged by before they are committed; default: Guard()
        Ctrl-C stops after the batch at work, a second one abandons it."""
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}")
        batch_size = self.recipe.batch_size if batch_size is None else batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        batches, skipped = self._check(edits, batch_size, on_invalid)
        with self._recording(run_dir, resume) as recorder:
            about = {"batch_size": batch_size, "on_error": on_error}
            reports, done = ([], []) if recorder is None else recorder.begin(batches, about, resume)
            for report in self._batches(batches, len(reports), on_error, watch, guard or Guard()):
                reports.append(report)
                done.extend(batches[report.batch] if report.error is None else ())
        return Run(EditSet(tuple(done)), tuple(reports), skipped)

    def undo(self, last: int | None = None, to: int | None = None) -> None:
        """Take batches back, weights and history bit for bit: the last ones (default 1), or all but the first `to`.

        Those in memory are rolled back, others rebuilt from the run directory. Raises ValueError for more than that."""
        count = len(self._history)
        if last is not None and to is not None:
            raise ValueError(f"undo: wanted last or to, got last={last} and to={to}")
        taken = count - to if to is not None else (last if last is not None else 1)
        if not 1 <= taken <= count or (self.recorder is None and taken > len(self.journal)):
            held = len(self.journal) if self.recorder is None else count
            raise ValueError(f"undo: {held} batches are in memory or recorded, asked for {taken}")
        if self.recorder is not None:
            with self.recorder.log.writing():
                self.recorder.rewind(count - taken)
        if taken > len(self.journal):
            return self.restore(count - taken)
        self._history.undo(taken, self.state, len(self.journal))
        for _ in range(taken):
            self.journal.undo()

    @contextlib.contextmanager
    def temporarily(self, edits: Sequence[Edit], batch_size: int | None = None, **options: Any) -> Iterator[Run]:
        """Edits inside the block, the model and all else bit for bit as it was after it. Nothing is recorded.

        options: those of `edit` but run_dir and resume"""
        if {"run_dir", "resume"} & set(options):
            raise ValueError("temporarily: edits that are taken back are not recorded, got run_dir or resume")
        state = {name: tensor.clone() for name, tensor in self.state.tensors().items()}
        changed = {layer: self.weights.changed(layer) for layer in self.weights.layers}
        weights = {layer: self.weights.stored(layer, index) for layer, index in changed.items()}
        outside = self.journal, self._history, self.recorder, self._token_budget
        self.journal, self._history, self.recorder = Journal(self.weights), self._history.copy(), None
        try:
            yield self.edit(edits, batch_size, **options)
        finally:
            self.weights.reset()
            for layer, index in changed.items():
                self.weights.put(layer, index, weights[layer])
            self.state.load(state)
            self.journal, self._history, self.recorder, self._token_budget = outside

    def ask(self, prompts: Sequence[str], n_tokens: int = 8) -> list[str]:
        """Greedy continuations of the prompts, without the prompts."""
        answers = []
        for prompt in prompts:
            ids = torch.tensor(encode(self.model.tokenizer, [prompt])[0], device=self.model.device)
            made = self.model.generate(ids, n_tokens, top_k=1)[0, ids.shape[1] :]
            answers.append(self.model.tokenizer.decode(made, skip_special_tokens=True))
        return answers

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the edited model and its tokenizer as an ordinary checkpoint."""
        self.model.model.save_pretrained(folder)
        self.model.tokenizer.save_pretrained(folder)

    def _check(self, edits: Sequence[Edit], batch_size: int, on_invalid: str) -> Checked:
        return check_edits(
            edits,
            batch_size,
            tokenizer=self.model.tokenizer,
            max_positions=self.model.max_positions,
            template_tokens=self.recipe.template_tokens(self.config),
            on_invalid=on_invalid,
        )

    def _settings(self) -> dict[str, Any]:
        return {"method": self.method, "config": self.config.model_dump(), "seed": self.seed}

    @contextlib.contextmanager
    def _recording(self, run_dir: str | Path | None, resume: bool) -> Iterator[Recorder | None]:
        """The run directory, held for writing; None when nothing is recorded."""
        if resume and run_dir is None and self.recorder is None:
            raise ValueError("resume: wanted run_dir, the folder of the run to go on with")
        if run_dir is not None and self.recorder is not None:
            if Path(run_dir).resolve() != self.recorder.log.folder.resolve():
                raise RunError(f"run_dir: this editor is recorded in {self.recorder.log.folder}, got {run_dir}")
        elif run_dir is not None:
            if not resume:
                check_new(run_dir)
            if is_run(run_dir):
                self._attach(Recorder.open(run_dir), prepare=True)
            elif self._history:
                raise RunError(f"run_dir: {len(self._history)} batches were written before anything was recorded")
            else:
                about = describe_run(self.model, self.weights, self._settings(), self.state.describe(), self._moments)
                self.recorder = Recorder.create(run_dir, about)
        with contextlib.nullcontext() if self.recorder is None else self.recorder.log.writing():
            yield self.recorder

    def _attach(self, recorder: Recorder, prepare: bool = False) -> None:
        """Take a recorded run over: its batches are written into the model, which must be unedited. prepare: make the
        state before, so that a run of another one is refused with nothing written."""
        if self._history:
            raise RunError(f"resume: wanted an editor without edits, got one with {len(self._history)} batches")
        recorder.check(self.model, self.weights, self._settings())
        if prepare or self._state is not None:
            self.state.adopt(recorder.header["prepared"])
        self.recorder, self._token_budget = recorder, recorder.token_budget
        self.restore(len(recorder.live))

    def restore(self, keep: int) -> None:
        """Read weights, state and history as after the first `keep` live batches from the run directory."""
        if self.recorder is None:
            raise RunError("restore: wanted an editor with a run directory, got one without")
        self.recorder.replay_weights(self.weights, keep)
        if self._state is not None:
            self.recorder.replay_state(self._state, keep)
        self.journal.forget()
        self._history = History(self.recorder.edits(record) for record in self.recorder.live[:keep])

    def _batches(
        self, batches: Sequence[EditSet], first: int, on_error: str, watch: Watcher | None, guard: Guard
    ) -> Iterator[BatchReport]:
        """Write the batches from `first` on, each a report."""
        state = self.state
        guard.begin(self.model, self.weights)
        if watch is not None:
            watch.begin()
        total = sum(map(len, batches[first:]))
        with track(total, f"editing ({self.method})", "edits", self.progress) as advance, Interrupts() as interrupts:

            def progress(n: float) -> None:
                interrupts.check()
                advance(n)

            for number, batch in enumerate(batches[first:], first):
                report = self._edit_batch(number, batch, guard, progress)
                if report.error is not None:
                    if self.recorder is not None:
                        self.recorder.reject(number, asdict(report), skipped=on_error == "skip")
                    if on_error == "stop":
                        raise BatchRejected(number, list(report.case_ids), report.error)
                    log.warning("batch %d skipped: %s", number, report.error)
                elif self.recorder is not None:
                    self.recorder.snapshot_if_due(self.weights, state)
                yield report
                if watch is not None:
                    watch.after_batch(report, last=number + 1 == len(batches))
                if interrupts.stop_requested:
                    raise KeyboardInterrupt

    def _edit_batch(self, number: int, batch: EditSet, guard: Guard, progress: Any) -> BatchReport:
        """Write one batch. A token budget that had to be halved stays so."""
        started = time.perf_counter()
        case_ids = tuple(edit.case_id for edit in batch)
        with Notes() as notes:
            try:
                report = self.write(number, batch, with_budget(self.config, self._token_budget), guard, progress, notes)
                self._token_budget = report.token_budget
            except RejectedUpdate as error:
                blamed = tuple(case_ids[row] for row in error.rows)
                report = BatchReport(number, blamed, 0.0, error=str(error))
            except (NotPositiveDefinite, GuardTripped) as error:
                report = BatchReport(number, case_ids, 0.0, error=str(error))
        give_back_freed()
        return replace(report, seconds=time.perf_counter() - started, notes=tuple(notes.lines))

    def write(
        self, number: int, batch: EditSet, config: Any, guard: Guard, progress: Any, notes: Notes, **again: Any
    ) -> BatchReport:
        """Write one batch inside a trial, judge and commit it, first on the disk.

        again: of a batch that is written anew, `known` values and the record that is `replaced`"""
        started = time.perf_counter()
        state, trial = self.state, self.journal.trial()

        def attempt(config: Any) -> tuple[Any, dict[str, float]]:
            trial.rollback()
            start = replace(self.start, config=config)
            result = self.recipe.run(start, state, batch, trial, progress, again.get("known"))
            return result, guard.check(self.model, self.weights, trial.touched)

        with trial, torch.no_grad():
            (result, measured), config = with_less_memory(attempt, config)
            report = BatchReport(
                number,
                tuple(edit.case_id for edit in batch),
                time.perf_counter() - started,
                None if bool(result.losses.isnan().all()) else float(result.losses.mean()),
                float(result.steps.float().mean()),
                tuple(result.written),
                dict(result.neurons),
                dict(result.norms),
                None,
                token_budget(config),
                tuple(notes.lines),
                measured,
            )
            kept = state.kept(result)
            if self.recorder is not None:
                replaced = again.get("replaced")
                self.recorder.commit(number, batch, trial, kept, result.tensors(), asdict(report), replaced)
            self.journal.commit(trial)
        self._history.append(batch, state, kept, len(self.journal))
        return report
