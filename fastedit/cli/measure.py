"""Commands that write no weight: eval, stats, locate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastedit.cli.console import AsJson, emit, errors, given, open_console, open_lines, refuse, stage
from fastedit.cli.inputs import (
    Chosen,
    Reading,
    account,
    background,
    check_device,
    choose,
    families,
    open_model,
    read_prose,
    read_records,
    tell_skipped,
)
from fastedit.cli.options import (
    Device,
    Dtype,
    Edits,
    FamilyFile,
    Fluency,
    Form,
    Join,
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

if TYPE_CHECKING:
    from fastedit.config import MomentConfig
    from fastedit.model.adapter import ModelAdapter


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
    join: Join = None,
    on_invalid: OnInvalid = "refuse",
    seed: Seed = 0,
    text: Text = None,
    fluency_prompts: Fluency = 50,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    family: FamilyFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on edit records, beside the unedited one."""
    console = open_console()
    with errors(console):
        from fastedit.evaluation.metrics import compare
        from fastedit.records.check import check_edits

        check_device(device)
        rows = families(family)
        prose = read_prose(text)
        records = read_records(console, edits, Reading(start, limit, form, target_field, on_invalid, join))
        lines = open_lines(console)
        if meg is not None:
            from fastedit.cli import meg as command
            from fastedit.methods.meg.editor import MeG

            refuse(given(context), command.UNUSED_BY_EVAL)
            opened = MeG(open_model(model, dtype, device, lines, rows), progress=lines)
            return emit(as_json, *command.evaluate(opened, meg, records))

        after = open_model(model, dtype, device, lines, rows)
        before = after if unedited is None else open_model(unedited, dtype, device, lines, rows)
        limits = {
            "tokenizer": after.tokenizer,
            "max_positions": after.max_positions,
            "n_embeddings": after.n_embeddings,
        }
        batches, skipped = check_edits(records, 1, **limits, on_invalid=on_invalid, needs_subject=False)
        tell_skipped(console, skipped)
        asked = [edit for batch in batches for edit in batch]
        stage(lines, "measuring")
        measured = compare(before, after, asked, prose, fluency_prompts=fluency_prompts, seed=seed, show=lines)
        emit(as_json, {**measured.to_dict(), **account(records, skipped)}, str(measured))


def stats(
    context: typer.Context,
    model: Model,
    layers: Annotated[str | None, typer.Option(help="layers, as 4-8 or 4,6,8; default: the preset's")] = None,
    method: Annotated[str, typer.Option(help="method whose preset names the layers")] = "nse",
    preset: Preset = None,
    settings: Settings = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    family: FamilyFile = None,
    seed: Seed = 0,
    moments: MomentText = None,
    moment_tokens: MomentTokens = None,
    as_json: AsJson = False,
) -> None:
    """Compute and store second moments, or say that they are stored already."""
    console = open_console()
    with errors(console):
        from fastedit.methods.closed_form.second_moments import stored_moments
        from fastedit.runtime.cache import cache_folder

        asked = None if layers is None else _layers(layers)
        chosen = choose(method, preset, settings or [], moment_tokens, given(context))
        if not chosen.method.uses_second_moments:
            raise ValueError(f"{method} uses no second moments")
        source, rows = background(moments, seed), families(family)

        lines = open_lines(console)
        adapter = open_model(model, dtype, device, lines, rows)
        if asked is not None and asked[-1] >= adapter.n_layers:
            raise ValueError(f"--layers must lie in 0-{adapter.n_layers - 1}, got {layers}")
        wanted, windows = _asked_of(chosen, adapter, asked)

        started = time.perf_counter()
        # Named, the folder must take them. They are read one by one for their traces.
        folder = cache_folder() / "moments"
        made = stored_moments(adapter, wanted, source, windows, folder, show=lines)
        seconds = time.perf_counter() - started

        traces = {layer: float(moment.trace()) for layer, moment in made.items()}
        told = [f"layer {layer}: trace {trace:.1f}" for layer, trace in traces.items()]
        data = {"seconds": seconds, "trace": traces, "folder": str(folder)}
        emit(as_json, data, "\n".join([*told, f"{seconds:.1f} s; stored in {folder}"]))


def _layers(text: str) -> list[int]:
    """Ascending layers, each once. Raises ValueError for text that is no list of layers."""
    from fastedit.config import layer_list

    try:
        return sorted(set(layer_list(text)))
    except ValueError as error:
        raise ValueError(f"--layers {error}") from None


def _asked_of(chosen: Chosen, model: ModelAdapter, layers: list[int] | None) -> tuple[list[int], MomentConfig]:
    """The layers, and how much text is read for them.

    layers: None = those of the preset, which is then needed
    Raises ValueError where layers are neither given nor in a preset."""
    from fastedit.config import MomentConfig, settings_from
    from fastedit.methods.presets import NoPreset, settings_for

    try:
        config = settings_for(chosen.method, model, chosen.preset, chosen.changes)
    except NoPreset as error:
        named = chosen.changes.get(chosen.method.text_setting or "", {})
        if layers is None:
            raise ValueError(f"{error.reason}: say which layers, as --layers 4-8") from None
        return layers, settings_from(MomentConfig, named)

    windows = chosen.method.text_config(config)
    assert windows is not None
    return list(chosen.method.layers(model, config)) if layers is None else layers, windows


def locate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="the text that the edit continues")],
    target: Annotated[str, typer.Option(help="what it is to be continued with")],
    neurons: Annotated[int, typer.Option(min=1, help="neurons per target token")] = 5,
    frozen_layers: Annotated[int, typer.Option(min=0, help="last layers without candidates")] = 3,
    plot: Annotated[Path | None, typer.Option(help="PNG for a heat map over the layers")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a PNG that stands there")] = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    family: FamilyFile = None,
    as_json: AsJson = False,
) -> None:
    """Show the neurons that FiNE would write for one edit, and the tokens that they promote."""
    console = open_console()
    with errors(console):
        from fastedit.methods.columns.neuron_report import locate_neurons
        from fastedit.runtime.places import check_file, new_file

        if plot is not None:
            check_file(plot, force)
        adapter = open_model(model, dtype, device, open_lines(console), families(family))
        report = locate_neurons(adapter, prompt, target, neurons, frozen_layers)
        if plot is not None:
            with new_file(plot, force) as file:
                report.plot(file)
        emit(as_json, report.to_dict(), str(report))
