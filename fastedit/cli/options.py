"""The options that several commands have, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def _seed(seed: int) -> int:
    """torch's generators take 64 bits."""
    if not -(2**63) <= seed < 2**63:
        raise typer.BadParameter(f"must be a whole number of 64 bits, got {seed}")
    return seed


Model = Annotated[str, typer.Argument(help="alias (smollm2-135m), hub id, folder or .gguf file")]
Edits = Annotated[Path, typer.Argument(help="edit records, .jsonl or .json")]
Seed = Annotated[int, typer.Option(help="seed of context templates and sampled text", callback=_seed)]
Start = Annotated[int, typer.Option(min=0, help="first record")]
Limit = Annotated[int | None, typer.Option(min=1, help="number of records")]
Text = Annotated[Path | None, typer.Option(help="text file for perplexity")]
MomentText = Annotated[Path | None, typer.Option(help="text for second moments; default: sampled from the model")]
MomentTokens = Annotated[int | None, typer.Option(min=1, help="tokens for second moments")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="of the weights")]
Device = Annotated[str, typer.Option(help="where the model runs: cpu, cuda, cuda:1, or auto, spread over all devices")]
FamilyFile = Annotated[
    Path | None, typer.Option("--family", help="YAML of module paths and names, for a model of no known family")
]
Preset = Annotated[
    str | None,
    typer.Option(help="settings: a name, or a .yaml file; default: those made for this model, or derived"),
]
Calibrate = Annotated[
    bool, typer.Option("--calibrate/--no-calibrate", help="try derived settings on a few facts before the first edit")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="a setting of the method, as rounds=2, value.steps=10 or layers=4-8"),
]
Form = Annotated[str, typer.Option(help="form of the records, such as zsre; auto: known by their fields")]
TargetField = Annotated[str | None, typer.Option(help="field to edit towards, where the form has several (zsre: alt)")]
Join = Annotated[
    str | None,
    typer.Option(
        help="text between prompt and target in records that name none; auto: a space where one belongs",
        show_default="auto",
    ),
]
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
