"""`fastedit cache` lists what is kept and removes that alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from fastedit.cli.main import app
from fastedit.model.load import load_model

TINY = Path(__file__).resolve().parents[1] / "tiny"


def cache(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["cache", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_it_is_listed_and_emptied(write_tiny_gguf: Callable[..., None], tmp_path: Path) -> None:
    folder = Path(os.environ["FASTEDIT_CACHE"])
    assert "0 entries, 0.0 MB" in cache()

    write_tiny_gguf(TINY / "model", tmp_path / "tiny.gguf")
    load_model(str(tmp_path / "tiny.gguf"))
    done = CliRunner().invoke(
        app,
        ["stats", str(TINY / "model"), "--layers", "1", "--moments", str(TINY / "text.txt"), "--moment-tokens", "500"],
    )
    assert done.exit_code == 0, done.output
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    (folder / "gguf" / "cut").mkdir()

    told = json.loads(cache("--json"))
    assert [entry["kind"] for entry in told["entries"]] == ["gguf", "gguf", "moments"]
    assert told["bytes"] == sum(entry["bytes"] for entry in told["entries"]) > 0
    text = cache()
    assert f"unpacked: {tmp_path / 'tiny.gguf'}" in text
    assert "damaged or unfinished: cut" in text
    assert "second moments and their eigenvectors, 1 file" in text

    assert "3 entries" in cache("--empty")
    assert "0 entries" in cache()
    assert (folder / "mine" / "notes.txt").read_text() == "mine"
