"""What several commands read and say: records, an editor, what was left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fastedit.cli.console import refuse, say
from fastedit.cli.options import Dtype, OnInvalid

if TYPE_CHECKING:
    from fastedit.editor import Editor
    from fastedit.records.edit import EditSet, Problem

TEXT_FLAGS = ("moments", "moment_tokens")


def read_records(
    console: Console,
    path: Path,
    start: int,
    limit: int | None,
    form: str,
    target_field: str | None,
    on_invalid: OnInvalid,
) -> EditSet:
    """The edits of a file; what was understood, and what was left out, is told on the console."""
    from fastedit.records.load import load_edits

    records = load_edits(path, start=start, limit=limit, form=form, target_field=target_field, on_invalid=on_invalid)
    say(console, records.describe())
    tell_skipped(console, records.skipped)
    return records


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


def make_editor(
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
    """An editor of a loaded model.

    typed: the options on the command line; those about text are refused where no text is read"""
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
