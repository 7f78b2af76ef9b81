"""The command line: edit, eval, stats, locate, demo, doctor; what deals with run directories is in `cli.runs`.

Results go to standard output (a table, or one JSON object with --json), progress and messages to standard error.
Exit codes: 0 done, 1 a batch was rejected or the installation is broken, 2 wrong input.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from fastedit.cli import runs
from fastedit.cli.console import AsJson, Unwritten, emit, errors, given, open_console, refuse, say
from fastedit.records.files import read_text
from fastedit.runtime.words import counted

if TYPE_CHECKING:
    from fastedit.editing.guard import Guard
    from fastedit.editing.watch import Watch
    from fastedit.editor import Editor
    from fastedit.records.edit import EditSet, Problem
    from fastedit.runs.reports import Run

app = typer.Typer(
    help="Edit facts inside transformer language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
runs.register(app)
Model = Annotated[str, typer.Argument(help="alias (smollm2-135m), hub id, folder or .gguf file")]
Edits = Annotated[Path, typer.Argument(help="edit records, .jsonl or .json")]
Seed = Annotated[int, typer.Option(help="seed of context templates and sampled text")]
Start = Annotated[int, typer.Option(min=0, help="first record")]
Limit = Annotated[int | None, typer.Option(min=1, help="number of records")]
Text = Annotated[Path | None, typer.Option(help="text file for perplexity")]
MomentText = Annotated[Path | None, typer.Option(help="text for second moments; default: sampled from the model")]
MomentTokens = Annotated[int | None, typer.Option(min=1, help="tokens for second moments")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="of the weights")]
Preset = Annotated[str | None, typer.Option(help="settings; default: those made for this model")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="a setting of the method: NAME=VALUE, as rounds=2 or value.steps=10")
]
Form = Annotated[str, typer.Option(help="form of the records, such as zsre; auto: known by their fields")]
TargetField = Annotated[str | None, typer.Option(help="field to edit towards, where the form has several (zsre: alt)")]
OnInvalid = Annotated[
    Literal["refuse", "skip"], typer.Option(help="a record that cannot be used: refuse the whole file, or skip it")
]
OnError = Annotated[Literal["stop", "skip"], typer.Option(help="a batch that cannot be written: stop or skip it")]
Method = Annotated[
    Literal["nse", "memit", "alphaedit", "fine", "kne", "kn", "meg", "meg-lookup"],
    typer.Option(help="the editing method"),
]
Others = Annotated[Path | None, typer.Option(help="meg: records that are not edited, to learn wordings and the gate")]
WorkDir = Annotated[Path | None, typer.Option(help="meg: folder that keeps each stage, so that a run can go on")]
MegStore = Annotated[Path | None, typer.Option("--meg", help="file saved by edit --method meg; prints its six numbers")]
Fluency = Annotated[int, typer.Option(min=0, help="prompts continued to measure fluency")]

MEG_METHODS = ("meg", "meg-lookup")
MISSED_SHOWN = 10
TEXT_FLAGS = ("moments", "moment_tokens")
UNUSED_WITHOUT_EVAL = {"fluency_prompts": "--fluency-prompts: with --no-eval no fluency is measured"}
UNUSED_WITHOUT_EVAL_AND_WATCH = {
    **UNUSED_WITHOUT_EVAL,
    "text": "--text: with --no-eval and without --watch no perplexity is measured",
}


def _records(
    console: Console,
    path: Path,
    start: int,
    limit: int | None,
    form: str,
    target_field: str | None,
    on_invalid: OnInvalid,
) -> EditSet:
    from fastedit.records.load import load_edits

    records = load_edits(path, start=start, limit=limit, form=form, target_field=target_field, on_invalid=on_invalid)
    say(console, records.describe())
    _tell_skipped(console, records.skipped)
    return records


def _tell_skipped(console: Console, problems: Sequence[Problem]) -> None:
    from fastedit.records.edit import listing

    if problems:
        n_skipped = len({(problem.source, problem.line, problem.case_id) for problem in problems})
        say(console, f"skipped {n_skipped} record{'s' * (n_skipped != 1)}:\n{listing(problems)}")


def _account(records: EditSet, skipped: Sequence[Problem]) -> dict[str, Any]:
    """What became of the records: those left out in reading, then those that the model cannot take."""
    problems = [dataclasses.asdict(problem) for problem in (*records.skipped, *skipped)]
    return {"form": records.form, "target_field": records.target_field, "skipped": problems}


def _editor(
    model: str,
    dtype: Dtype,
    method_name: str,
    preset: str | None,
    settings: Sequence[str],
    seed: int,
    text: Path | None,
    text_tokens: int | None,
    typed: set[str],
) -> Editor:
    from fastedit.config import parse_changes
    from fastedit.editor import Editor
    from fastedit.methods.registry import method_named
    from fastedit.model.background_text import Source
    from fastedit.model.load import load_model

    method = method_named(method_name)
    if method.text_setting is None:
        refuse(typed, {name: f"{_flag(name)}: {method.name} reads no background text" for name in TEXT_FLAGS})

    tokens = [] if text_tokens is None else [f"{method.text_setting}.tokens={text_tokens}"]
    changes = parse_changes([*settings, *tokens])
    editor = Editor(load_model(model, dtype), method, changes, Source(text, seed), seed, preset=preset)

    if not method.reads_text(editor.config):
        why = f"{method.name} reads no background text with these settings"
        refuse(typed, {name: f"{_flag(name)}: {why}" for name in TEXT_FLAGS})
    return editor


def _flag(parameter: str) -> str:
    return f"--{parameter.replace('_', '-')}"


def _edit_meg(
    console: Console,
    typed: set[str],
    model: str,
    dtype: Dtype,
    method: str,
    path: Path,
    start: int,
    limit: int | None,
    form: str,
    target_field: str | None,
    on_invalid: OnInvalid,
    others: Path | None,
    settings: Sequence[str],
    seed: int,
    work_dir: Path | None,
    evaluation: bool,
    save: Path | None,
    as_json: bool,
) -> None:
    """`edit --method meg`: nothing is written into a weight, so the flags about weights are refused."""
    from fastedit.cli import meg
    from fastedit.config import parse_changes
    from fastedit.model.load import load_model

    refuse(typed, meg.UNUSED_BY_EDIT)
    records = _records(console, path, start, limit, form, target_field, on_invalid)
    beside = [] if others is None else _records(console, others, 0, None, "auto", None, on_invalid)

    changes, adapter = parse_changes(settings), load_model(model, dtype)
    emit(as_json, *meg.edit(adapter, method, records, beside, changes, seed, work_dir, on_invalid, evaluation, save))


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
        live = Recorder.open(run_dir).live
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
    data = {**run.to_dict(), **_account(records, run.skipped)}
    numbers = f"{counted(len(run.edits), 'edit')}, {run.written} written, {run.taken} taken"
    lines = [f"{numbers}; {run.seconds_per_edit:.2f} s per edit"]
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


def _watching(editor: Editor, records: EditSet, every: int | None, text: str | None) -> Watch | None:
    from fastedit.editing.watch import Watch

    return None if every is None else Watch(editor, records[:50], every, text)


@app.command()
def edit(
    context: typer.Context,
    model: Model,
    edits: Edits,
    method: Method = "nse",
    preset: Preset = None,
    settings: Settings = None,
    dtype: Dtype = "float32",
    batch_size: Annotated[int | None, typer.Option(min=1, help="edits written together; default: the method's")] = None,
    start: Start = 0,
    limit: Limit = None,
    seed: Seed = 0,
    moments: MomentText = None,
    moment_tokens: MomentTokens = None,
    form: Form = "auto",
    target_field: TargetField = None,
    on_invalid: OnInvalid = "refuse",
    on_error: OnError = "stop",
    evaluation: Annotated[bool, typer.Option("--eval/--no-eval", help="measure before and after")] = True,
    text: Text = None,
    fluency_prompts: Fluency = 50,
    watch: Annotated[int | None, typer.Option(min=1, help="measure every so many batches on the way")] = None,
    save: Annotated[Path | None, typer.Option(help="folder for the edited model")] = None,
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
        from fastedit.cli import meg

        typed = given(context)
        if method in MEG_METHODS:
            return _edit_meg(
                console, typed, model, dtype, method, edits, start, limit, form, target_field, on_invalid,
                others, settings or [], seed, work_dir, evaluation, save, as_json,
            )  # fmt: skip

        refuse(typed, meg.ONLY_FOR_MEG)
        if not evaluation:
            refuse(typed, UNUSED_WITHOUT_EVAL if watch is not None else UNUSED_WITHOUT_EVAL_AND_WATCH)
        _tell_run(console, run_dir, resume)
        records = _records(console, edits, start, limit, form, target_field, on_invalid)
        editor = _editor(model, dtype, method, preset, settings or [], seed, moments, moment_tokens, typed)

        prose = None if text is None else read_text(text)
        watching = _watching(editor, records, watch, prose)
        guard = _guard(records, canaries, max_growth)
        run = editor.edit(records, batch_size, on_error, on_invalid, watching or (), run_dir, resume, guard)

        _tell_skipped(console, run.skipped)
        data, lines = _told(records, run, watching)
        if evaluation and len(run.edits):
            evaluated = editor.evaluate(run.edits, prose, fluency_prompts=fluency_prompts)
            data["evaluation"] = evaluated.to_dict()
            lines.append(str(evaluated))
        if save is not None:
            editor.save_pretrained(save)
            lines.append(f"saved to {save}")
        emit(as_json, data, "\n".join(lines))
        _warn_of_missed(console, run)


@app.command("eval")
def evaluate_command(
    context: typer.Context,
    model: Model,
    edits: Edits,
    unedited: Annotated[str | None, typer.Option(help="the model before the edits, to compare with")] = None,
    meg: MegStore = None,
    start: Start = 0,
    limit: Limit = None,
    form: Form = "auto",
    target_field: TargetField = None,
    on_invalid: OnInvalid = "refuse",
    seed: Seed = 0,
    text: Text = None,
    fluency_prompts: Fluency = 50,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Measure a model on edit records, beside the unedited one."""
    console = open_console()
    with errors(console):
        from fastedit.evaluation.metrics import compare
        from fastedit.model.load import load_model
        from fastedit.records.check import check_edits

        records = _records(console, edits, start, limit, form, target_field, on_invalid)
        prose = None if text is None else read_text(text)
        if meg is not None:
            from fastedit.cli import meg as command

            refuse(given(context), command.UNUSED_BY_EVAL)
            return emit(as_json, *command.evaluate(load_model(model, dtype), meg, records))

        after = load_model(model, dtype)
        before = after if unedited is None else load_model(unedited, dtype)
        limits = {
            "tokenizer": after.tokenizer,
            "max_positions": after.max_positions,
            "n_embeddings": after.n_embeddings,
        }
        batches, skipped = check_edits(records, 1, **limits, on_invalid=on_invalid, needs_subject=False)
        _tell_skipped(console, skipped)
        asked = [edit for batch in batches for edit in batch]
        measured = compare(before, after, asked, text=prose, fluency_prompts=fluency_prompts, seed=seed)
        emit(as_json, {**measured.to_dict(), **_account(records, skipped)}, str(measured))


@app.command()
def stats(
    context: typer.Context,
    model: Model,
    layers: Annotated[str | None, typer.Option(help="layers, as 4-8 or 4,6,8; default: the preset's")] = None,
    method: Annotated[str, typer.Option(help="method whose preset names the layers")] = "nse",
    preset: Preset = None,
    settings: Settings = None,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    moments: MomentText = None,
    moment_tokens: MomentTokens = None,
    as_json: AsJson = False,
) -> None:
    """Compute and store second moments, or say that they are stored already."""
    console = open_console()
    with errors(console):
        from fastedit.methods.closed_form.second_moments import second_moments
        from fastedit.methods.registry import method_named
        from fastedit.model.background_text import Source

        if not method_named(method).uses_second_moments:
            raise ValueError(f"{method} uses no second moments")
        typed = given(context)
        editor = _editor(model, dtype, method, preset, settings or [], seed, moments, moment_tokens, typed)
        wanted = _layers(layers, editor.adapter.n_layers) if layers else list(editor.weights.layers)

        started = time.perf_counter()
        windows = editor.method.text_config(editor.config)
        assert windows is not None
        made = second_moments(editor.adapter, wanted, Source(moments, seed), windows)
        seconds = time.perf_counter() - started

        traces = {layer: float(moment.trace()) for layer, moment in made.items()}
        lines = [f"layer {layer}: trace {trace:.1f}" for layer, trace in traces.items()]
        emit(as_json, {"seconds": seconds, "trace": traces}, "\n".join([*lines, f"{seconds:.1f} s"]))


def _layers(text: str, n_layers: int) -> list[int]:
    try:
        first, dash, last = text.partition("-")
        layers = list(range(int(first), int(last) + 1)) if dash else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers must look like 4-8 or 4,6,8, got {text!r}") from None
    if not layers or any(not 0 <= layer < n_layers for layer in layers):
        raise ValueError(f"--layers must lie in 0-{n_layers - 1}, got {text!r}")
    return layers


@app.command()
def locate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="the text that the edit continues")],
    target: Annotated[str, typer.Option(help="what it is to be continued with")],
    neurons: Annotated[int, typer.Option(min=1, help="neurons per target token")] = 5,
    frozen_layers: Annotated[int, typer.Option(min=0, help="last layers without candidates")] = 3,
    plot: Annotated[Path | None, typer.Option(help="PNG for a heat map over the layers")] = None,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Show the neurons that FiNE would write for one edit, and the tokens that they promote."""
    console = open_console()
    with errors(console):
        from fastedit.methods.columns.neuron_report import locate_neurons
        from fastedit.model.load import load_model

        report = locate_neurons(load_model(model, dtype), prompt, target, neurons, frozen_layers)
        if plot is not None:
            report.plot(plot)
        emit(as_json, report.to_dict(), str(report))


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="alias, hub id, folder or .gguf file")] = "smollm2-135m",
    n_edits: Annotated[int, typer.Option(min=1, help="how many of the shipped facts")] = 50,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Edit a real model with the facts that ship with fastedit, and show what changed and what did not."""
    console = open_console()
    with errors(console):
        from fastedit.cli.demo import run_demo

        data, text = run_demo(model, n_edits, seed, console)
        emit(as_json, data, text)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this installation has, and fail when something is wrong with it."""
    from fastedit.cli.doctor import examine

    examination = examine()
    emit(as_json, examination.to_dict(), str(examination))
    if examination.problems:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `fastedit` command."""
    app()
