"""`fastedit edit`: records are read, edits written, measured and saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fastedit.cli.console import (
    AsJson,
    BatchLines,
    Unwritten,
    emit,
    errors,
    given,
    open_console,
    open_lines,
    refuse,
    say,
    stage,
)
from fastedit.cli.inputs import (
    Reading,
    account,
    background,
    check_device,
    choose,
    families,
    make_editor,
    open_model,
    read_prose,
    read_records,
    tell_skipped,
)
from fastedit.cli.options import (
    Calibrate,
    Device,
    Dtype,
    Edits,
    FamilyFile,
    Fluency,
    Form,
    Join,
    Limit,
    Method,
    Model,
    MomentText,
    MomentTokens,
    OnError,
    OnInvalid,
    Others,
    Preset,
    Seed,
    Settings,
    Start,
    TargetField,
    Text,
    WorkDir,
)
from fastedit.cli.saving import Force, Save, SaveDtype, SaveFormat, Saving
from fastedit.runtime.progress import Lines
from fastedit.runtime.words import counted

if TYPE_CHECKING:
    from fastedit.editing.guard import Guard
    from fastedit.editing.watch import Watch
    from fastedit.editor import Editor
    from fastedit.model.families import Family
    from fastedit.records.edit import EditSet
    from fastedit.runs.reports import Run, Watcher

MEG_METHODS = ("meg", "meg-lookup")
MISSED_SHOWN = 10
UNUSED_WITHOUT_EVAL = {"fluency_prompts": "--fluency-prompts: with --no-eval no fluency is measured"}
UNUSED_WITHOUT_EVAL_AND_WATCH = {
    **UNUSED_WITHOUT_EVAL,
    "text": "--text: with --no-eval and without --watch no perplexity is measured",
}


def _edit_meg(
    console: Console,
    typed: set[str],
    model: tuple[str, Dtype, str],
    rows: Sequence[Family],
    method: str,
    path: Path,
    reading: Reading,
    others: Path | None,
    settings: Sequence[str],
    seed: int,
    work_dir: Path | None,
    evaluation: bool,
    save: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """`edit --method meg`: nothing is written into a weight, so the flags about weights are refused.

    model, rows: what `open_model` takes"""
    from fastedit.cli import meg
    from fastedit.methods.meg.config import method_name
    from fastedit.methods.meg.editor import MeG

    refuse(typed, meg.UNUSED_BY_EDIT)
    place = meg.check_save(save, force, typed)
    config = meg.settings(method, settings)
    check_device(model[2])
    records = read_records(console, path, reading)
    beside = [] if others is None else read_records(console, others, Reading(on_invalid=reading.on_invalid))

    lines = open_lines(console)
    editor = MeG(open_model(*model, lines, rows), method_name(method), config, seed, lines)
    emit(as_json, *meg.edit(editor, records, beside, work_dir, reading.on_invalid, evaluation, place, force))


def _tell_run(console: Console, run_dir: Path | None, resume: bool) -> None:
    """What the run directory holds. What cannot go on is refused here, before a model is loaded."""
    from fastedit.runs.log import check_new, is_run
    from fastedit.runs.recorder import Recorder

    if run_dir is None:
        if resume:
            raise ValueError("--resume needs --run-dir")
    elif not resume:
        check_new(run_dir)
    elif is_run(run_dir):
        live = Recorder.open(run_dir, quiet=True).live
        n_edits = sum(len(record.body["edits"]) for record in live)
        batches, edits = counted(len(live), "batch", "batches"), counted(n_edits, "edit", "edits")
        say(console, f"{run_dir}: going on after {batches} with {edits}")


def _guard(records: EditSet, canaries: int, max_growth: float) -> Guard:
    """Canaries are taken from all over the stream."""
    from fastedit.editing.guard import Guard

    asked = records[:: max(1, len(records) // canaries)] if canaries else ()
    return Guard(max_growth, asked)


def _told(records: EditSet, run: Run, watching: Watch | None) -> tuple[dict[str, Any], list[str]]:
    """What `edit` says of its run, as data and as lines."""
    data = {**run.to_dict(), **account(records, run.skipped)}
    numbers = f"{counted(len(run.edits), 'edit')}, {run.written} written, {run.taken} taken"
    lines = [f"{numbers}; {run.seconds_per_edit:.2f} s per edit" if len(run.edits) else numbers]
    lines += [f"batch {report.batch} skipped: {report.error}" for report in run.batches if report.error]

    if watching is not None:
        data["curve"] = watching.to_dict()
        lines.append(f"on the first {len(watching.sample)} records:\n{watching}")
    return data, lines


def _warn_of_missed(console: Console, run: Run) -> None:
    """Name the first edits that did not take. Raises Unwritten when nothing was written for any edit."""
    missed = run.missed or ()
    if missed:
        shown = "\n".join(f"  {edit}" for edit in missed[:MISSED_SHOWN])
        more = len(missed) - MISSED_SHOWN
        rest = f"\n  and {more} more, in --json and in the run directory" if more > 0 else ""
        say(console, f"warning: {counted(len(missed), 'edit')} did not take:\n{shown}{rest}")

    if run.edits and run.written == 0:
        raise Unwritten(
            f"0 of {counted(len(run.edits), 'edit')} were written: every residual lies outside the method's bounds"
            " (residual_min, residual_max), which are in units of the model"
        )


def _origin(editor: Editor) -> str:
    """Where the settings come from, in words."""
    origin = editor.settings.origin
    return origin if origin in ("given", "derived") else f"preset {origin}"


def _settings(editor: Editor) -> dict[str, Any]:
    """The settings, where they come from, and how derived ones did on the facts they were tried on."""
    from fastedit.runtime.hashing import plain

    found = editor.calibration
    data = {
        "origin": _origin(editor),
        "config": editor.config.model_dump(mode="json"),
        "calibration": None if found is None else found.to_dict(),
    }
    return dict(plain(data))


def _watching(editor: Editor, records: EditSet, every: int | None, text: str | None) -> Watch | None:
    from fastedit.editing.watch import Watch

    return None if every is None else Watch(editor, records[:50], every, text)


def _watchers(
    editor: Editor, records: EditSet, size: int | None, lines: Lines | None, watching: Watch | None
) -> list[Watcher]:
    """What is called after each batch. The line of a batch comes first: what follows may take long."""
    n_batches = math.ceil(len(records) / (size or editor.method.batch_size))
    told = None if lines is None else BatchLines(lines, n_batches)
    return [watcher for watcher in (told, watching) if watcher is not None]


def edit(
    context: typer.Context,
    model: Model,
    edits: Edits,
    method: Method = "nse",
    preset: Preset = None,
    settings: Settings = None,
    calibrate: Calibrate = True,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    family: FamilyFile = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="edits written together; default: the method's")] = None,
    start: Start = 0,
    limit: Limit = None,
    seed: Seed = 0,
    moments: MomentText = None,
    moment_tokens: MomentTokens = None,
    form: Form = "auto",
    target_field: TargetField = None,
    join: Join = None,
    on_invalid: OnInvalid = "refuse",
    on_error: OnError = "stop",
    evaluation: Annotated[bool, typer.Option("--eval/--no-eval", help="measure before and after")] = True,
    text: Text = None,
    fluency_prompts: Fluency = 50,
    watch: Annotated[int | None, typer.Option(min=1, help="measure every so many batches on the way")] = None,
    save: Save = None,
    save_format: SaveFormat = "checkpoint",
    save_dtype: SaveDtype = None,
    force: Force = False,
    run_dir: Annotated[Path | None, typer.Option(help="record every batch there, so that nothing is lost")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --run-dir")] = False,
    canaries: Annotated[int, typer.Option(min=0, help="records whose neighbours each batch must leave alone")] = 0,
    max_growth: Annotated[float, typer.Option(help="times that the norm of an edited layer may grow")] = 10.0,
    others: Others = None,
    work_dir: WorkDir = None,
    as_json: AsJson = False,
) -> None:
    """Write edits into a model, measure it, and save it."""
    console = open_console()
    with errors(console):
        typed = given(context)
        reading = Reading(start, limit, form, target_field, on_invalid, join)
        if method in MEG_METHODS:
            return _edit_meg(
                console, typed, (model, dtype, device), families(family), method, edits, reading, others,
                settings or [], seed, work_dir, evaluation, save, force, as_json,
            )  # fmt: skip

        chosen = choose(method, preset, settings or [], moment_tokens, typed)
        _refuse_unused(typed, evaluation, watch is not None)
        source, prose = background(moments, seed), read_prose(text)
        saving = Saving(save, save_format, save_dtype, force)
        saving.check(model, typed)
        check_device(device)
        _tell_run(console, run_dir, resume)
        rows = families(family, run_dir)
        records = read_records(console, edits, reading)
        guard = _guard(records, canaries, max_growth)

        lines = open_lines(console)
        adapter = open_model(model, dtype, device, lines, rows)
        editor = make_editor(adapter, chosen, source, seed, typed, lines, calibrate)
        say(console, f"settings of {method}: {_origin(editor)}")
        saving.check_loaded(editor)
        watching = _watching(editor, records, watch, prose)
        watchers = _watchers(editor, records, batch_size, lines, watching)
        run = editor.edit(records, batch_size, on_error, on_invalid, watchers, run_dir, resume, guard)

        tell_skipped(console, run.skipped)
        data, told = _told(records, run, watching)
        data["settings"] = _settings(editor)
        if save is not None:
            stage(lines, f"saving to {save}")
        not_saved = saving.save(console, editor, data, told)
        try:
            if evaluation and len(run.edits):
                stage(lines, "measuring")
                evaluated = editor.evaluate(run.edits, prose, fluency_prompts=fluency_prompts, show=lines)
                data["evaluation"] = evaluated.to_dict()
                told.append(str(evaluated))
        finally:
            emit(as_json, data, "\n".join(told))

        _warn_of_missed(console, run)
        if not_saved is not None:
            raise not_saved


def _refuse_unused(typed: set[str], evaluation: bool, watched: bool) -> None:
    """Raise ValueError for options of `edit` that this run would not use."""
    from fastedit.cli import meg

    refuse(typed, meg.ONLY_FOR_MEG)
    if not evaluation:
        refuse(typed, UNUSED_WITHOUT_EVAL if watched else UNUSED_WITHOUT_EVAL_AND_WATCH)
