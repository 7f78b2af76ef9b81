"""Commands that write no weight: eval, stats, locate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fastedit.cli.console import AsJson, emit, errors, given, open_console, refuse
from fastedit.cli.inputs import account, make_editor, read_records, tell_skipped
from fastedit.cli.options import (
    Dtype,
    Edits,
    Fluency,
    Form,
    Limit,
    MegStore,
    Model,
    MomentText,
    MomentTokens,
    OnInvalid,
    Preset,
    Seed,
    Settings,
    Start,
    TargetField,
    Text,
)
from fastedit.records.files import read_text


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

        records = read_records(console, edits, start, limit, form, target_field, on_invalid)
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
        tell_skipped(console, skipped)
        asked = [edit for batch in batches for edit in batch]
        measured = compare(before, after, asked, text=prose, fluency_prompts=fluency_prompts, seed=seed)
        emit(as_json, {**measured.to_dict(), **account(records, skipped)}, str(measured))


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
        from fastedit.runtime.cache import cache_folder

        if not method_named(method).uses_second_moments:
            raise ValueError(f"{method} uses no second moments")
        typed = given(context)
        editor = make_editor(model, dtype, method, preset, settings or [], seed, moments, moment_tokens, typed)
        wanted = _layers(layers, editor.adapter.n_layers) if layers else list(editor.weights.layers)

        started = time.perf_counter()
        windows = editor.method.text_config(editor.config)
        assert windows is not None
        # Named, the folder must take them; otherwise a cache that cannot be written is only a warning.
        folder = cache_folder() / "moments"
        made = second_moments(editor.adapter, wanted, Source(moments, seed), windows, folder)
        seconds = time.perf_counter() - started

        traces = {layer: float(moment.trace()) for layer, moment in made.items()}
        lines = [f"layer {layer}: trace {trace:.1f}" for layer, trace in traces.items()]
        data = {"seconds": seconds, "trace": traces, "folder": str(folder)}
        emit(as_json, data, "\n".join([*lines, f"{seconds:.1f} s; stored in {folder}"]))


def _layers(text: str, n_layers: int) -> list[int]:
    try:
        first, dash, last = text.partition("-")
        layers = list(range(int(first), int(last) + 1)) if dash else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers must look like 4-8 or 4,6,8, got {text!r}") from None
    if not layers or any(not 0 <= layer < n_layers for layer in layers):
        raise ValueError(f"--layers must lie in 0-{n_layers - 1}, got {text!r}")
    return layers


def locate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="the text that the edit continues")],
    target: Annotated[str, typer.Option(help="what it is to be continued with")],
    neurons: Annotated[int, typer.Option(min=1, help="neurons per target token")] = 5,
    frozen_layers: Annotated[int, typer.Option(min=0, help="last layers without candidates")] = 3,
    plot: Annotated[Path | None, typer.Option(help="PNG for a heat map over the layers")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a PNG that stands there")] = False,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Show the neurons that FiNE would write for one edit, and the tokens that they promote."""
    console = open_console()
    with errors(console):
        from fastedit.methods.columns.neuron_report import locate_neurons
        from fastedit.model.load import load_model
        from fastedit.runtime.places import check_file, new_file

        if plot is not None:
            check_file(plot, force)
        report = locate_neurons(load_model(model, dtype), prompt, target, neurons, frozen_layers)
        if plot is not None:
            with new_file(plot, force) as file:
                report.plot(file)
        emit(as_json, report.to_dict(), str(report))
