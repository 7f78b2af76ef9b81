"""What several commands read: settings, records, models; each is judged before the next, and slower, one is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from fastedit.cli.console import refuse, say, stage
from fastedit.cli.options import Dtype, OnInvalid
from fastedit.records.files import read_text
from fastedit.runtime.progress import Lines, Show

if TYPE_CHECKING:
    from fastedit.config import Config
    from fastedit.editor import Editor
    from fastedit.methods.base import AnyMethod
    from fastedit.model.adapter import ModelAdapter
    from fastedit.model.background_text import Source
    from fastedit.model.families import Family
    from fastedit.records.edit import EditSet, Problem

TEXT_FLAGS = ("moments", "moment_tokens")


class Reading(NamedTuple):
    """How a file of records is read; see `fastedit.load_edits`. join: for records that name none, None = as usual"""

    start: int = 0
    limit: int | None = None
    form: str = "auto"
    target_field: str | None = None
    on_invalid: OnInvalid = "refuse"
    join: str | None = None


class Chosen(NamedTuple):
    """A method with what the command line says about its settings, judged.

    preset: name or file; None = the one made for the model
    """

    method: AnyMethod
    preset: str | None
    changes: Mapping[str, Any]


def read_records(console: Console, path: Path, reading: Reading) -> EditSet:
    """The edits of a file; what was understood, and what was left out, is told on the console."""
    from fastedit.records.load import load_edits

    records = load_edits(
        path,
        start=reading.start,
        limit=reading.limit,
        form=reading.form,
        target_field=reading.target_field,
        on_invalid=reading.on_invalid,
    )
    say(console, records.describe())
    tell_skipped(console, records.skipped)

    return records if reading.join in (None, "auto") else _joined(records, reading.join)


def _joined(records: EditSet, join: str | None) -> EditSet:
    """The records with this text between prompt and target, where they name none of their own."""
    edits = [edit if edit.join is not None else edit.model_copy(update={"join": join}) for edit in records]
    return dataclasses.replace(records, edits=tuple(edits))


def tell_skipped(console: Console, problems: Sequence[Problem]) -> None:
    """List what was wrong with the records that were left out."""
    from fastedit.records.edit import listing

    if problems:
        n_skipped = len({(problem.source, problem.line, problem.case_id) for problem in problems})
        say(console, f"skipped {n_skipped} record{'s' * (n_skipped != 1)}:\n{listing(problems)}")


def account(records: EditSet, skipped: Sequence[Problem]) -> dict[str, Any]:
    """What became of the records: those left out in reading, then those that the model cannot take."""
    problems = [dataclasses.asdict(problem) for problem in (*records.skipped, *skipped)]
    return {"form": records.form, "target_field": records.target_field, "skipped": problems}


def config_class(method: str) -> type[Config] | None:
    """The class of a method's settings, without importing the method, and torch with it; None for other names."""
    from fastedit.methods.closed_form import config as closed_form
    from fastedit.methods.columns import config as columns

    classes: dict[str, type[Config]] = {
        "nse": closed_form.NSEConfig,
        "memit": closed_form.MEMITConfig,
        "alphaedit": closed_form.AlphaEditConfig,
        "fine": columns.FiNEConfig,
        "kne": columns.KNEConfig,
        "kn": columns.KNConfig,
    }
    return classes.get(method)


def choose(
    method_name: str, preset: str | None, settings: Sequence[str], text_tokens: int | None, typed: set[str]
) -> Chosen:
    """The method and its settings, judged as far as that can be done without the model.

    typed: the options on the command line; those about text are refused where the method reads none
    Raises ValueError with all that is wrong with the settings."""
    from fastedit.config import check_changes, parse_changes

    changes = parse_changes(settings)
    quick = config_class(method_name)
    if quick is not None:
        check_changes(quick, changes)

    from fastedit.methods.presets import check_settings
    from fastedit.methods.registry import method_named

    method = method_named(method_name)
    if method.text_setting is None:
        refuse(typed, {name: f"{_flag(name)}: {method.name} reads no background text" for name in TEXT_FLAGS})

    if text_tokens is not None:
        changes = parse_changes([*settings, f"{method.text_setting}.tokens={text_tokens}"])
    check_settings(method, preset, changes)
    return Chosen(method, preset, changes)


def background(path: Path | None, seed: int) -> Source:
    """The text that a method reads, judged as far as that can be done without the model. path: None = the model's own

    Raises OSError or ValueError for a file that cannot be read or holds no text."""
    from fastedit.model.background_text import Source

    source = Source(path, seed)
    source.check()
    return source


def read_prose(path: Path | None) -> str | None:
    """The text whose perplexity is measured. Raises OSError or ValueError for a file that holds none."""
    if path is None:
        return None

    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: no text to measure the perplexity of")
    return text


def check_device(device: str) -> None:
    """Raise ValueError for a device that is none, or that is not here."""
    named = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
    if device in ("cpu", "auto"):
        return
    if named is None:
        raise ValueError(f"--device must be cpu, cuda, cuda:1 (or another number), or auto, got {device!r}")

    import torch

    count = torch.cuda.device_count()
    if int(named[1] or 0) >= count:
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(count))])
        raise ValueError(f"--device: {device} is not here; there is {there}")


def open_model(
    model: str, dtype: Dtype | None, device: str, lines: Lines | None, rows: Sequence[Family] | None = None
) -> ModelAdapter:
    """A loaded model. dtype: None = float32; rows: to choose its family from, None = those that ship"""
    check_device(device)
    stage(lines, f"loading {model}")
    from fastedit.model.load import load_model

    return load_model(model, dtype or "float32", device, families(None) if rows is None else rows)


def families(file: Path | None, run_dir: Path | None = None) -> Sequence[Family]:
    """The rows to choose a model's family from: the one of a file, or those that ship.

    run_dir: of a run that goes on, whose own row counts where no file is given
    Raises ValueError for what is no row; OSError."""
    from fastedit.model.families import FAMILIES
    from fastedit.model.family_file import read_family
    from fastedit.runs.log import is_run
    from fastedit.runs.recorder import Recorder

    if file is not None:
        return (read_family(file),)
    if run_dir is not None and is_run(run_dir):
        return Recorder.open(run_dir, quiet=True).families

    return FAMILIES


def make_editor(
    adapter: ModelAdapter,
    chosen: Chosen,
    text: Source,
    seed: int,
    typed: set[str],
    progress: Show = None,
    calibrate: bool = True,
) -> Editor:
    """An editor of a loaded model.

    typed: the options on the command line; those about text are refused where these settings read none"""
    from fastedit.editor import Editor

    method = chosen.method
    editor = Editor(
        adapter, method, chosen.changes, text, seed, progress=progress, preset=chosen.preset, calibrate=calibrate
    )

    if not method.reads_text(editor.config):
        why = f"{method.name} reads no background text with these settings"
        refuse(typed, {name: f"{_flag(name)}: {why}" for name in TEXT_FLAGS})
    return editor


def _flag(parameter: str) -> str:
    return f"--{parameter.replace('_', '-')}"
