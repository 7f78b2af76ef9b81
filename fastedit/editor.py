"""The public face: an editor of one model, with what was edited so far."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastedit.config import EditConfig, changed
from fastedit.editing.guard import Guard
from fastedit.editing.stream import OnError, Stream
from fastedit.methods.base import AnyMethod, AnyState
from fastedit.methods.presets import Settled, check_settings, settle
from fastedit.methods.registry import METHODS, method_named
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.model.families import FAMILIES, Family
from fastedit.model.load import Dtype, load_model
from fastedit.model.tokens import prompt_ids, warn_of_tokens_beyond
from fastedit.records.check import OnInvalid, check_edits
from fastedit.records.edit import CaseId, Edit, EditSet
from fastedit.runs.log import RunError, is_run
from fastedit.runs.recorder import Recorder
from fastedit.runs.reports import Run, Watcher
from fastedit.runtime.progress import Show, tell
from fastedit.runtime.words import counted
from fastedit.weights.editable import EditableWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastedit.editing.calibration import Calibration
    from fastedit.editing.export import Exported, Format
    from fastedit.editing.undo_edit import Forgotten
    from fastedit.evaluation.metrics import Evaluation

log = logging.getLogger(__name__)


class Editor:
    """Edits facts in a model, batch after batch. The model stays edited; `undo` goes back.

    adapter: the model; or use `Editor.from_pretrained` or `Editor.from_model`
    method: a name in `fastedit.METHODS`, or a method of your own
    config: whole settings of the method, or a mapping of changes to its preset, such as {"rounds": 2}
    moments: layer -> second moment (d_ff, d_ff), or a Source of text; default: text sampled from the model
    seed: of context templates and sampled text
    undo_depth: batches that can be undone from memory
    progress: True or False shows or hides progress bars, None shows them on a terminal; a `Lines` gets lines of text
    preset: name or .yaml file of the preset to start from; default: the one made for this model, else settings are
        derived from the model (`Editor.settings`)
    calibrate: try derived settings on a few facts before the first edit, see `Editor.calibrate`
    Raises ValueError for an unknown method, settings that do not fit the model, or a method that has no preset for it
        and derives no settings; TypeError for the settings of another method.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        method: str | AnyMethod = "nse",
        config: EditConfig | Mapping[str, Any] | None = None,
        moments: Mapping[int, Tensor] | Source | None = None,
        seed: int = 0,
        undo_depth: int = 3,
        progress: Show = None,
        preset: str | Path | None = None,
        calibrate: bool = True,
    ) -> None:
        if not isinstance(adapter, ModelAdapter):
            raise TypeError(
                f"Editor takes a ModelAdapter, got {type(adapter).__name__}; for a loaded model use Editor.from_model"
            )

        method = method_named(method)
        self.settings = settle(method, adapter, preset, config)
        self.stream = Stream(adapter, method, self.settings.config, moments, seed, undo_depth, progress)
        self.calibration: Calibration | None = None
        self._calibrates = calibrate and method.is_checked and self.settings.origin == "derived"

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        method: str | AnyMethod = "nse",
        config: EditConfig | Mapping[str, Any] | None = None,
        *,
        preset: str | Path | None = None,
        dtype: Dtype = "float32",
        device: str | Mapping[str, int | str] = "cpu",
        families: Sequence[Family] = FAMILIES,
        moments: Mapping[int, Tensor] | Source | None = None,
        seed: int = 0,
        undo_depth: int = 3,
        progress: Show = None,
        calibrate: bool = True,
    ) -> Editor:
        """Load `source` (alias, hub id, folder or GGUF file) and make an editor for it.

        dtype, device, families: see :func:`fastedit.load_model`; the others: see `Editor`"""
        method = method_named(method)
        check_settings(method, preset, config)

        adapter = load_model(source, dtype, device, families)
        return cls(adapter, method, config, moments, seed, undo_depth, progress, preset, calibrate)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        method: str | AnyMethod = "nse",
        config: EditConfig | Mapping[str, Any] | None = None,
        *,
        preset: str | Path | None = None,
        families: Sequence[Family] = FAMILIES,
        moments: Mapping[int, Tensor] | Source | None = None,
        seed: int = 0,
        undo_depth: int = 3,
        progress: Show = None,
        calibrate: bool = True,
    ) -> Editor:
        """An editor for a model and tokenizer that are already loaded; the model is edited in place.

        families: rows to look the model up in, see :class:`fastedit.model.families.Family`; the others: see `Editor`
        """
        adapter = ModelAdapter(model, tokenizer, families)
        adapter.check_forward()
        warn_of_tokens_beyond(tokenizer, adapter.n_embeddings)
        return cls(adapter, method, config, moments, seed, undo_depth, progress, preset, calibrate)

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        adapter: ModelAdapter | None = None,
        method: str | AnyMethod | None = None,
        moments: Mapping[int, Tensor] | Source | None = None,
        undo_depth: int = 3,
        progress: Show = None,
        to: int | None = None,
        device: str | Mapping[str, int | str] = "cpu",
    ) -> Editor:
        """The editor of a run directory with its batches written into the model, ready to go on.

        adapter: the unedited model; default: loaded from where the run says it was
        method: the run's method, where it is one of your own
        moments: default: computed from the text that the run names
        to: write only the first so many batches, which also opens a run whose later ones are damaged; the editor
            cannot record then
        device: where the model is loaded to, see :func:`fastedit.load_model`; without use when `adapter` is given
        Raises RunError for no run, DamagedRun for a damaged one, WrongModel for another model."""
        recorder = Recorder.open(run_dir, to)
        if method is None and recorder.method_name not in METHODS:
            raise RunError(
                f"{run_dir}: written by a method of your own, {recorder.method_name!r}; pass it as method= in Python,"
                f" Editor.resume({str(run_dir)!r}, method=...); `fastedit log`, `diff` and `undo --last` need none"
            )
        chosen = method_named(recorder.method_name if method is None else method)
        if chosen.name != recorder.method_name:
            raise RunError(f"{run_dir}: written by method {recorder.method_name!r}, got {chosen.name!r}")
        config = recorder.config(chosen.config_class)
        source = Source(recorder.text, recorder.seed) if moments is None else moments

        model = adapter or recorder.load_model(device)
        editor = cls(model, chosen, config, source, recorder.seed, undo_depth, progress)
        editor.stream.attach(recorder)
        return editor

    @property
    def model(self) -> PreTrainedModel:
        """The edited transformers model, or the `PeftModel` around it that was given."""
        return self.adapter.given

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.adapter.tokenizer

    @property
    def adapter(self) -> ModelAdapter:
        """The model as the methods see it."""
        return self.stream.adapter

    @property
    def method(self) -> AnyMethod:
        """The method that edits."""
        return self.stream.method

    @property
    def config(self) -> EditConfig:
        """The settings of the method. New ones apply from the next call on; the edited layers stay the same.

        Setting raises TypeError for the settings of another method, ValueError for other layers or while the editor is
        recorded in a run directory."""
        return self.stream.config

    @config.setter
    def config(self, config: EditConfig) -> None:
        if not isinstance(config, EditConfig):
            raise TypeError(f"config: wanted whole settings, got {type(config).__name__}; see fastedit.config.changed")

        settings = settle(self.method, self.adapter, config=config).config
        if self.method.layers(self.adapter, settings) != self.weights.layers:
            raise ValueError(f"config: the edited layers are {self.weights.layers}; make another editor for others")
        if self.recorder is not None:
            raise ValueError(f"config: the settings of a recorded run cannot change ({self.recorder.log.folder})")

        self.stream.config = settings
        self.settings = Settled(settings, "given", {})
        self._calibrates = False

    @property
    def weights(self) -> EditableWeights:
        """The weights that the method may write, now and before any edit."""
        return self.stream.weights

    @property
    def state(self) -> AnyState:
        """The method's state, such as second moments and past keys; prepared at first use, which can take minutes."""
        return self.stream.state

    @property
    def recorder(self) -> Recorder | None:
        """What writes the run directory; None when nothing is recorded."""
        return self.stream.recorder

    @property
    def seed(self) -> int:
        """Seed of context templates and sampled text."""
        return self.stream.seed

    @property
    def progress(self) -> Show:
        """Whether progress bars are shown, None = on a terminal; or what gets lines of text in their place."""
        return self.stream.progress

    @property
    def edits(self) -> EditSet:
        """All edits in force, in the order in which they were written."""
        return self.stream.edits

    def edit(
        self,
        edits: Sequence[Edit],
        batch_size: int | None = None,
        on_error: OnError = "stop",
        on_invalid: OnInvalid = "refuse",
        watch: Watcher | Sequence[Watcher] | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        guard: Guard | None = None,
        verify: bool = True,
    ) -> Run:
        """Write `edits` in batches.

        batch_size: default: the method's, 100 for closed forms
        on_error: what follows a batch that cannot be written or exceeds a bound of the guard, and was rolled back:
            "stop" raises BatchRejected, earlier batches stay; "skip" reports it and continues
        on_invalid: what follows from anything wrong in the edits, before any weight is touched: "refuse" raises
            InvalidEdits with all of it; "skip" leaves the wrong edits out, `Run.skipped` says why
        watch: one watcher or several, called before the first batch and after each; their time is in no report
        run_dir: folder in which everything this editor does from then on is recorded. Raises RunError
        resume: continue the run in that folder, or begin one. Edits that the run holds are not written again if it
            begins with them; those behind them are new. Others raise RunError where they do not fit
        guard: judges each batch before it is committed; default: Guard()
        verify: look at all edits in one pass after the last batch: `Run.missed` names those that did not take
        Ctrl-C stops after the current batch, a second one abandons that batch.
        Raises ValueError inside `temporarily` and `unedited`."""
        with self.stream.turn():
            self.stream.check_block("edit", "temporarily", "unedited")
            return self._edit(edits, batch_size, on_error, on_invalid, watch, run_dir, resume, guard, verify)

    def _edit(
        self,
        edits: Sequence[Edit],
        batch_size: int | None,
        on_error: OnError,
        on_invalid: OnInvalid,
        watch: Watcher | Sequence[Watcher] | None,
        run_dir: str | Path | None,
        resume: bool,
        guard: Guard | None,
        verify: bool,
    ) -> Run:
        """`edit`, in any block."""
        given: object = edits
        if isinstance(given, Edit):
            raise TypeError("edits: wanted a sequence of edits, got one Edit; put it in a list")
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}")
        size = self.method.batch_size if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size must be at least 1, got {size}")

        batches, skipped = check_edits(
            edits,
            size,
            tokenizer=self.tokenizer,
            max_positions=self.adapter.max_positions,
            template_tokens=self.method.template_tokens(self.config),
            on_invalid=on_invalid,
            needs_subject=self.method.needs_subject,
            n_embeddings=self.adapter.n_embeddings,
        )
        if resume and run_dir is not None and not self.stream.committed:
            self._take_settings_of(run_dir)
        if self._calibrates and self.calibration is None and not self.stream.committed:
            self._check_settings()

        watchers = watch if isinstance(watch, Sequence) else [] if watch is None else [watch]
        reports, committed, missed = self.stream.write(
            batches, size, on_error, watchers, guard or Guard(), run_dir, resume, verify
        )
        return Run(EditSet(tuple(committed)), tuple(reports), skipped, missed)

    def calibrate(self, again: bool = False) -> Calibration:
        """Try the editor's settings on a few facts that the model knows, and undo it; `calibration` keeps the result.

        The first `edit` with derived settings does it of itself.
        again: also where the cache holds the result for this model, method and settings
        Raises ValueError inside `unedited` and where edits are in force, and WeightsChanged where something else wrote
        into the model."""
        from fastedit.editing.calibration import calibrate

        with self.stream.turn():
            self.stream.check_block("calibrate", "unedited")
            self.calibration = calibrate(self.stream, again)
        return self.calibration

    def _take_settings_of(self, run_dir: str | Path) -> None:
        """Go on with the settings of a run where ours are derived: another version may derive others.

        Settings that the caller chose count; the run is refused where it has others, when it is attached."""
        if self.settings.origin != "derived" or not is_run(run_dir):
            return

        recorder = Recorder.open(run_dir, quiet=True)
        if recorder.method_name != self.method.name:
            return

        config = recorder.config(self.method.config_class)
        if changed(config, self.settings.changes) == config:
            self._calibrates = False
            self.settings = self.settings._replace(config=config)
            stream = self.stream
            moments, progress = stream.moments, stream.progress
            self.stream = Stream(self.adapter, self.method, config, moments, stream.seed, stream.undo_depth, progress)

    def _check_settings(self) -> None:
        """Try derived settings. Raises CalibrationFailed where they are not fit for use."""
        from fastedit.editing.calibration import CalibrationFailed, table

        found = self.calibrate()
        told = f"{self.method.name}: settings derived from the model, {found}"
        if found.failed:
            self.calibration = None
            raise CalibrationFailed(
                f"{told}\n{table(found)}\ngive settings of your own (--set, --preset; config=), see what `fastedit"
                " suggest` finds, or edit all the same (--no-calibrate; calibrate=False)"
            )

        if found.unchecked is not None:
            log.warning("%s", told)
        else:
            tell(self.progress, told)

    def undo(self, last: int | None = None, to: int | None = None) -> None:
        """Take batches back, weights and state bit for bit: the last ones (default 1), or all but the first `to`.

        Those in memory are rolled back, older ones rebuilt from the run directory. Raises ValueError for more, and
        TypeError for what is no whole number."""
        _check_whole("last", last)
        _check_whole("to", to)
        if last is not None and to is not None:
            raise ValueError(f"undo: wanted last or to, got last={last} and to={to}")

        count = len(self.stream.committed)
        if to is not None and not 0 <= to < count:
            batches = counted(count, "batch is", "batches are")
            raise ValueError(f"undo: {batches} in force, asked to keep {to}")

        if to is not None:
            last = count - to
        self.stream.undo(1 if last is None else last)

    def forget(self, case_id: CaseId) -> Forgotten:
        """Take one recorded edit back: the batches from its own on are solved again without it.

        Raises RunError when nothing is recorded, ValueError for an unknown case_id."""
        from fastedit.editing.undo_edit import forget

        return forget(self.stream, case_id)

    @contextlib.contextmanager
    def temporarily(
        self,
        edits: Sequence[Edit],
        batch_size: int | None = None,
        on_error: OnError = "stop",
        on_invalid: OnInvalid = "refuse",
        watch: Watcher | Sequence[Watcher] | None = None,
        guard: Guard | None = None,
        verify: bool = True,
    ) -> Iterator[Run]:
        """Edits inside the block, the model and all else bit for bit as it was after it. Nothing is recorded.

        The arguments are those of `edit`."""
        self.stream.check_block("temporarily", "unedited")
        with self.stream.temporarily():
            run = self._edit(edits, batch_size, on_error, on_invalid, watch, None, False, guard, verify)
            with self.stream.block("temporarily"):
                yield run

    @contextlib.contextmanager
    def unedited(self) -> Iterator[None]:
        """Inside the block the model has its original weights. Raises EditorBusy while another thread edits."""
        with self.stream.turn(), self.stream.block("unedited"), self.weights.rewound():
            yield

    def ask(self, prompts: Sequence[str], n_tokens: int = 8) -> list[str]:
        """Greedy continuations of the prompts, `n_tokens` tokens each, without the prompts.

        A space at the end of a prompt is not read: it belongs to the answer, as in training and scoring."""
        if isinstance(prompts, str):
            raise TypeError("prompts: wanted a sequence of texts, got one text; put it in a list")

        answers = []
        for row in prompt_ids(self.tokenizer, prompts, self.adapter.n_embeddings):
            ids = torch.tensor([row], device=self.adapter.device)
            continuation = self.adapter.generate(ids, n_tokens, top_k=1)[0, ids.shape[1] :]
            answers.append(str(self.tokenizer.decode(continuation, skip_special_tokens=True)))
        return answers

    def evaluate(
        self,
        edits: Sequence[Edit] | None = None,
        text: str | None = None,
        text_tokens: int = 20_000,
        fluency_prompts: int = 50,
        show: Show = None,
    ) -> Evaluation:
        """Measure the model as it is and as it was before any edit; see :func:`fastedit.evaluate`.

        edits: the records to ask about; default: all edits in force"""
        from fastedit.evaluation.metrics import evaluate

        return evaluate(self, self.edits if edits is None else edits, text, text_tokens, fluency_prompts, show)

    def export(
        self,
        folder: str | Path,
        form: Format = "checkpoint",
        rank: int | None = None,
        dtype: Dtype | None = None,
        force: bool = False,
    ) -> Exported:
        """Write the edits for other programs; see :func:`fastedit.editing.export.export`.

        Raises EditorBusy while another thread edits, and ValueError inside `unedited`."""
        from fastedit.editing.export import export

        with self.stream.turn():
            self.stream.check_block("export", "unedited")
            return export(self.adapter, self.weights, self.edits, folder, form, rank, dtype, force)

    def save_pretrained(self, folder: str | Path, dtype: Dtype | None = None, force: bool = False) -> Exported:
        """Write the edited model and its tokenizer as an ordinary checkpoint, read it back and compare.

        dtype: None = that of the checkpoint that the model was loaded from; float32 for a GGUF file
        force: replace the model that stands in the folder; other files there stay
        See :func:`fastedit.editing.export.export` for what is raised."""
        return self.export(folder, "checkpoint", None, dtype, force)

    def __repr__(self) -> str:
        name = self.adapter.source or type(self.model).__name__
        recorded = "" if self.recorder is None else f", recorded in {self.recorder.log.folder}"
        edits = counted(len(self.edits), "edit")
        batches = counted(len(self.stream.committed), "batch", "batches")
        return f"Editor({name}, method {self.method.name}, {edits} in {batches}{recorded})"


def _check_whole(name: str, given: object) -> None:
    """Raise TypeError for what counts no batches."""
    if given is not None and (isinstance(given, bool) or not isinstance(given, Integral)):
        raise TypeError(f"undo: wanted a whole number of batches as {name}, got {given!r}")
