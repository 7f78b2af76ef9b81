"""The editor: drives a recipe over a stream of batches, each inside a trial that is committed or rolled back."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastedit.adapter import ModelAdapter
from fastedit.apply import RejectedUpdate
from fastedit.checks import Checked, check_edits
from fastedit.config import CONFIGS, EditConfig, load_preset, preset_for
from fastedit.edits import Edit, EditSet, Problem
from fastedit.families import FAMILIES, Family
from fastedit.journal import Journal
from fastedit.loading import load_model
from fastedit.memory import give_back_freed
from fastedit.method import Result, Start
from fastedit.progress import track
from fastedit.recipes import RECIPES
from fastedit.solver import NotPositiveDefinite
from fastedit.stats import Source
from fastedit.tokens import encode
from fastedit.weights import ColumnWeights, EditableWeights

log = logging.getLogger(__name__)


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
    norms; error: why it was rolled back, or None when it was committed."""

    batch: int
    case_ids: tuple[Any, ...]
    seconds: float
    loss: float | None = None
    steps: float | None = None
    written: tuple[int, ...] = ()
    neurons: Mapping[int, int] = field(default_factory=dict)
    norms: Mapping[int, float] = field(default_factory=dict)
    error: str | None = None


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
    """What looks at a stream of batches from outside; see :class:`fastedit.watch.Watch`."""

    def begin(self) -> None:
        """Called before the first batch."""
        ...

    def after_batch(self, report: BatchReport, last: bool) -> None:
        """Called after a batch was committed or rolled back; `last`: no other follows."""
        ...


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
        self._history: list[tuple[EditSet, Any]] = []

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
        dtype, device, families: see :func:`fastedit.loading.load_model`
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

        families: rows to look the model up in, see :class:`fastedit.families.Family`; options: those of `Editor`"""
        adapter = ModelAdapter(model, tokenizer, families)
        adapter.check_forward()
        return cls(adapter, method, **options)

    @property
    def start(self) -> Start:
        """What the method is given, with `config` as it is now."""
        return Start(self.model, self.weights, self.config, self._moments, self.seed, self.progress)

    @property
    def state(self) -> Any:
        """What the method prepares and carries on, such as second moments and past keys; made at first use, which can
        take a while. See :class:`fastedit.method.State`."""
        if self._state is None:
            self._state = self.recipe.prepare(self.start)
        return self._state

    @property
    def edits(self) -> EditSet:
        """All edits committed and not undone, in order."""
        return EditSet(tuple(edit for batch, _ in self._history for edit in batch))

    def edit(
        self,
        edits: Sequence[Edit],
        batch_size: int = 100,
        on_error: str = "stop",
        on_invalid: str = "refuse",
        watch: Watcher | None = None,
    ) -> Run:
        """Write `edits` in batches.

        on_error: what to do with a batch that cannot be written (it is rolled back first): "stop" raises
            BatchRejected, earlier batches stay; "skip" reports it and goes on
        on_invalid: what to do, before any weight is touched, with anything wrong in the edits: "refuse" raises
            InvalidEdits with all of it; "skip" leaves the wrong edits out, `Run.skipped` says why
        watch: told before the first batch and after each one; its time is not counted in the reports"""
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        batches, skipped = self._check(edits, batch_size, on_invalid)
        state = self.state
        reports = []
        done: list[Edit] = []
        if watch is not None:
            watch.begin()
        with track(sum(map(len, batches)), f"editing ({self.method})", "edits", self.progress) as advance:
            for number, batch in enumerate(batches):
                report = self._edit_batch(number, batch, state, advance)
                reports.append(report)
                if report.error is None:
                    done.extend(batch)
                elif on_error == "stop":
                    raise BatchRejected(number, list(report.case_ids), report.error)
                else:
                    log.warning("batch %d skipped: %s", number, report.error)
                if watch is not None:
                    watch.after_batch(report, last=number + 1 == len(batches))
        return Run(EditSet(tuple(done)), tuple(reports), skipped)

    def undo(self, last: int = 1) -> None:
        """Take the last batches back, weights and history bit for bit. Raises ValueError when fewer are in memory."""
        if not 1 <= last <= len(self.journal):
            raise ValueError(f"undo: {len(self.journal)} batches are in memory, asked for {last}")
        for _ in range(last):
            self.journal.undo()
            _, snapshot = self._history.pop()
            self.state.restore(snapshot)

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

    def _edit_batch(self, number: int, batch: EditSet, state: Any, advance: Any) -> BatchReport:
        started = time.perf_counter()
        case_ids = tuple(edit.case_id for edit in batch)
        trial = self.journal.trial()
        try:
            with trial, torch.no_grad():
                result = self.recipe.run(self.start, state, batch, trial, advance)
                self.journal.commit(trial)
        except RejectedUpdate as error:
            blamed = tuple(case_ids[row] for row in error.rows)
            return BatchReport(number, blamed, time.perf_counter() - started, error=str(error))
        except NotPositiveDefinite as error:
            return BatchReport(number, case_ids, time.perf_counter() - started, error=str(error))
        self._remember(batch, state, result)
        give_back_freed()
        return BatchReport(
            number,
            case_ids,
            time.perf_counter() - started,
            None if bool(result.losses.isnan().all()) else float(result.losses.mean()),
            float(result.steps.float().mean()),
            tuple(result.written),
            dict(result.neurons),
            dict(result.norms),
        )

    def _remember(self, batch: EditSet, state: Any, result: Result) -> None:
        # Snapshots beyond the journal's depth could never be used again.
        for old, (edits, snapshot) in enumerate(self._history):
            if snapshot is not None and old < len(self._history) + 1 - len(self.journal):
                self._history[old] = (edits, None)
        self._history.append((batch, state.snapshot()))
        state.remember(result)
