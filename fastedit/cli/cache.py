"""`fastedit cache`: what is kept between runs, how large it is, and how to be rid of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from fastedit.cli.console import AsJson, emit, errors, open_console
from fastedit.runtime.words import counted

# Only these folders are listed and emptied: the cache may be a folder with other things in it.
GGUF, MOMENTS, CALIBRATIONS = "gguf", "moments", "calibrations"

Empty = Annotated[bool, typer.Option("--empty", help="remove all of it; it is computed again when it is needed")]


def cache(empty: Empty = False, as_json: AsJson = False) -> None:
    """List what is kept between runs: unpacked GGUF files, second moments, checks of derived settings. Or remove it."""
    with errors(open_console()):
        from fastedit.runtime.cache import cache_folder

        folder = cache_folder()
        rows = _rows(folder)
        if empty:
            for kind in (GGUF, MOMENTS, CALIBRATIONS):
                if (folder / kind).is_dir():
                    shutil.rmtree(folder / kind)

        n_bytes = sum(row["bytes"] for row in rows)
        lines = [f"{row['bytes'] / 1e6:>10.1f} MB  {row['what']}" for row in rows]
        total = f"{counted(len(rows), 'entry', 'entries')}, {n_bytes / 1e6:.1f} MB"
        lines.append(f"{folder}: {total}{', removed' if empty else ''}")
        emit(as_json, {"folder": str(folder), "entries": rows, "bytes": n_bytes, "removed": empty}, "\n".join(lines))


def _rows(folder: Path) -> list[dict[str, Any]]:
    """What is in the cache: a row for each unpacked GGUF file, and one for all files of each other kind."""
    rows = []
    if (folder / GGUF).is_dir():
        parts = sorted(part for part in (folder / GGUF).iterdir() if part.is_dir())
        rows += [{"kind": GGUF, "what": _source(part), "bytes": _size(part)} for part in parts]

    for kind, what in (
        (MOMENTS, "second moments and their eigenvectors"),
        (CALIBRATIONS, "checks of derived settings"),
    ):
        if (folder / kind).is_dir():
            files = counted(len(list((folder / kind).iterdir())), "file")
            rows.append({"kind": kind, "what": f"{what}, {files}", "bytes": _size(folder / kind)})
    return rows


def _source(part: Path) -> str:
    """Which GGUF file was unpacked there."""
    try:
        return f"unpacked: {json.loads((part / 'about.json').read_text(encoding='utf-8'))['source']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"unpacked, damaged or unfinished: {part.name}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
