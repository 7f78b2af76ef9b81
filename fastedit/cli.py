"""The command line: edit, eval, stats, demo, doctor.

Results go to standard output (a table, or one JSON object with --json), progress and messages to standard error.
Exit codes: 0 done, 1 a batch was rejected or the installation is broken, 2 wrong input.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

app = typer.Typer(
    help="Edit facts inside transformer language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Model = Annotated[str, typer.Argument(help="alias (smollm2-135m), hub id, folder or .gguf file")]
Edits = Annotated[Path, typer.Argument(help="edit records, .jsonl or .json")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Seed = Annotated[int, typer.Option(help="seed of context templates and sampled text")]
Start = Annotated[int, typer.Option(min=0, help="first record")]
Limit = Annotated[int | None, typer.Option(min=1, help="number of records")]
Text = Annotated[Path | None, typer.Option(help="text file for perplexity")]
MomentText = Annotated[Path | None, typer.Option(help="text for second moments; default: sampled from the model")]
MomentTokens = Annotated[int | None, typer.Option(min=1, help="tokens for second moments")]
Preset = Annotated[str | None, typer.Option(help="settings; default: those made for this model")]
Fluency = Annotated[int, typer.Option(min=0, help="prompts continued to measure fluency")]


@contextlib.contextmanager
def _errors(console: Console) -> Iterator[None]:
    """Errors a user can cause become one message and an exit code; anything else is ours and keeps its traceback."""
    from fastedit.adapter import UnsupportedModel
    from fastedit.editor import BatchRejected
    from fastedit.edits import InvalidEdits
    from fastedit.loading import ModelNotFound
    from fastedit.stats import BadMoments

    try:
        yield
    except BatchRejected as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except (InvalidEdits, ModelNotFound, UnsupportedModel, BadMoments, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def _start() -> Console:
    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    return console


def _emit(as_json: bool, data: dict[str, Any], text: str) -> None:
    typer.echo(json.dumps(data) if as_json else text)


def _editor(model: str, method: str, preset: str | None, seed: int, moments: Path | None, tokens: int | None) -> Any:
    from fastedit.config import load_preset, preset_for
    from fastedit.editor import Editor
    from fastedit.loading import load_model
    from fastedit.stats import Source

    adapter = load_model(model)
    if preset:
        config = load_preset(method, preset)
    else:
        config = preset_for(method, adapter.n_layers, adapter.d_model, adapter.d_ff)
    if tokens is not None:
        config = config.model_copy(update={"moments": config.moments.model_copy(update={"tokens": tokens})})
    return Editor(adapter, method, config, Source(moments, seed), seed)


@app.command()
def edit(
    model: Model,
    edits: Edits,
    method: Annotated[str, typer.Option(help="recipe")] = "nse",
    preset: Preset = None,
    batch_size: Annotated[int, typer.Option(min=1, help="edits written together")] = 100,
    start: Start = 0,
    limit: Limit = None,
    seed: Seed = 0,
    moments: MomentText = None,
    moment_tokens: MomentTokens = None,
    on_error: Annotated[str, typer.Option(help="a batch that cannot be written: stop or skip")] = "stop",
    evaluation: Annotated[bool, typer.Option("--eval/--no-eval", help="measure before and after")] = True,
    text: Text = None,
    fluency_prompts: Fluency = 50,
    save: Annotated[Path | None, typer.Option(help="folder for the edited model")] = None,
    as_json: AsJson = False,
) -> None:
    """Write edits into a model, measure it, and save it."""
    console = _start()
    with _errors(console):
        from fastedit.evaluation import evaluate
        from fastedit.readers import load_edits

        records = load_edits(edits, start=start, limit=limit)
        editor = _editor(model, method, preset, seed, moments, moment_tokens)
        run = editor.edit(records, batch_size, on_error)
        data, lines = run.to_dict(), [f"{len(run.edits)} edits, {run.seconds_per_edit:.2f} s per edit"]
        lines += [f"batch {r.batch} skipped: {r.error}" for r in run.batches if r.error]
        if evaluation and len(run.edits):
            prose = None if text is None else text.read_text(encoding="utf-8")
            found = evaluate(editor, run.edits, text=prose, fluency_prompts=fluency_prompts)
            data["evaluation"] = found.to_dict()
            lines.append(str(found))
        if save is not None:
            editor.save_pretrained(save)
            lines.append(f"saved to {save}")
        _emit(as_json, data, "\n".join(lines))


@app.command("eval")
def evaluate_command(
    model: Model,
    edits: Edits,
    unedited: Annotated[str | None, typer.Option(help="the model before the edits, to compare with")] = None,
    start: Start = 0,
    limit: Limit = None,
    seed: Seed = 0,
    text: Text = None,
    fluency_prompts: Fluency = 50,
    as_json: AsJson = False,
) -> None:
    """Measure a model on edit records, beside the unedited one."""
    console = _start()
    with _errors(console):
        from fastedit.evaluation import compare
        from fastedit.loading import load_model
        from fastedit.readers import load_edits

        records = load_edits(edits, start=start, limit=limit)
        prose = None if text is None else text.read_text(encoding="utf-8")
        after = load_model(model)
        before = after if unedited is None else load_model(unedited)
        found = compare(before, after, records, text=prose, fluency_prompts=fluency_prompts, seed=seed)
        _emit(as_json, found.to_dict(), str(found))


@app.command()
def stats(
    model: Model,
    layers: Annotated[str | None, typer.Option(help="layers, as 4-8 or 4,6,8; default: the preset's")] = None,
    method: Annotated[str, typer.Option(help="recipe whose preset names the layers")] = "nse",
    preset: Preset = None,
    seed: Seed = 0,
    moments: MomentText = None,
    moment_tokens: MomentTokens = None,
    as_json: AsJson = False,
) -> None:
    """Compute and store second moments, or say that they are stored already."""
    console = _start()
    with _errors(console):
        from fastedit.stats import Source, second_moments

        editor = _editor(model, method, preset, seed, moments, moment_tokens)
        wanted = _layers(layers, editor.model.n_layers) if layers else list(editor.config.layers)
        started = time.perf_counter()
        found = second_moments(editor.model, wanted, Source(moments, seed), editor.config.moments)
        seconds = time.perf_counter() - started
        traces = {layer: float(moment.trace()) for layer, moment in found.items()}
        lines = [f"layer {layer}: trace {trace:.1f}" for layer, trace in traces.items()]
        _emit(as_json, {"seconds": seconds, "trace": traces}, "\n".join([*lines, f"{seconds:.1f} s"]))


def _layers(text: str, n_layers: int) -> list[int]:
    try:
        first, dash, last = text.partition("-")
        found = list(range(int(first), int(last) + 1)) if dash else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers must look like 4-8 or 4,6,8, got {text!r}") from None
    if not found or any(not 0 <= layer < n_layers for layer in found):
        raise ValueError(f"--layers must lie in 0-{n_layers - 1}, got {text!r}")
    return found


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="alias, hub id, folder or .gguf file")] = "smollm2-135m",
    n_edits: Annotated[int, typer.Option(min=1, help="how many of the shipped facts")] = 50,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Edit a real model with the facts that ship with fastedit, and show what changed and what did not."""
    console = _start()
    with _errors(console):
        from fastedit.demo import run_demo

        data, text = run_demo(model, n_edits, seed, console)
        _emit(as_json, data, text)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this installation has, and fail when something is wrong with it."""
    from fastedit.doctor import examine

    found = examine()
    _emit(as_json, found.to_dict(), str(found))
    if found.problems:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `fastedit` command."""
    app()
