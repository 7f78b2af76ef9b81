"""`fastedit suggest`: settings for a model without a preset, tried on it, as a preset file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastedit.cli.console import AsJson, emit, errors, given, open_console, open_lines
from fastedit.cli.inputs import background, check_device, choose, families, open_model
from fastedit.cli.options import Device, Dtype, FamilyFile, Model, MomentText, MomentTokens, Seed, Settings

Tried = Annotated[
    Literal["nse", "memit", "alphaedit", "fine", "kne", "kn"], typer.Option(help="the method whose settings are wanted")
]
Out = Annotated[Path | None, typer.Option(help="file for the settings, which --preset takes; default: standard output")]
Plot = Annotated[Path | None, typer.Option(help="PNG that shows what was tried")]
Force = Annotated[bool, typer.Option("--force", help="replace files that stand there")]


def suggest_command(
    context: typer.Context,
    model: Model,
    method: Tried = "nse",
    out: Out = None,
    plot: Plot = None,
    settings: Settings = None,
    force: Force = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    family: FamilyFile = None,
    seed: Seed = 0,
    moments: MomentText = None,
    moment_tokens: MomentTokens = None,
    as_json: AsJson = False,
) -> None:
    """Derive settings for a model, try them at several depths or rates on a few facts, and write the best as YAML."""
    console = open_console()
    with errors(console):
        from fastedit.editing.suggest import suggest
        from fastedit.runtime.hashing import plain
        from fastedit.runtime.places import check_file, new_file

        for place in (out, plot):
            if place is not None:
                check_file(place, force)
        check_device(device)
        chosen = choose(method, None, settings or [], moment_tokens, given(context))
        source, rows = background(moments, seed), families(family)

        lines = open_lines(console)
        adapter = open_model(model, dtype, device, lines, rows)
        found = suggest(adapter, chosen.method, chosen.changes, source, seed, lines)

        if out is not None:
            with new_file(out, force) as file:
                file.write_text(found.yaml(), encoding="utf-8")
        if plot is not None:
            with new_file(plot, force) as file:
                found.plot(file)

        where = found.yaml() if out is None else f"written to {out}; use it with --preset {out}"
        emit(as_json, plain(found.to_dict()), f"{found}\n{where}")
