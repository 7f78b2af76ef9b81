"""Progress of a run whose error stream is no terminal: lines there, and nothing but the result on standard output."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastedit.cli.console import open_console, open_lines
from fastedit.cli.main import app
from fastedit.editor import Editor
from fastedit.records.edit import EditSet

TINY = Path(__file__).resolve().parents[1] / "tiny"
MODEL, FACTS, TEXT = str(TINY / "model"), str(TINY / "facts.jsonl"), str(TINY / "text.txt")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "cache"))
    text = "config: {layers: 2-4, covariance_weight: 100, value: {steps: 5}, moments: {tokens: 2048}}"
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    return str(tmp_path / "own.yaml")


def test_stages_and_batches_are_told_line_by_line(own: str, tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    done = CliRunner().invoke(
        app,
        [
            *("edit", MODEL, FACTS, "--preset", own, "--moments", TEXT, "--limit", "5", "--batch-size", "2"),
            *("--fluency-prompts", "0", "--save", saved, "--json"),
        ],
    )
    assert done.exit_code == 0, done.output
    json.loads(done.stdout)
    told = iter(done.stderr.splitlines())
    for wanted in (
        r"read 5 edits: form ",
        rf"loading {re.escape(MODEL)}$",
        r"second moments of layers 2-4: 2 048 tokens$",
        r"preparing the solvers: 3 layers$",
        r"editing \(nse\): 5 edits$",
        r"batch 1 of 3: 2 edits, loss [\d.]+, [\d.]+ s$",
        r"batch 2 of 3: 2 edits, loss [\d.]+, [\d.]+ s$",
        r"batch 3 of 3: 1 edit, loss [\d.]+, [\d.]+ s$",
        rf"saving to {re.escape(saved)}$",
        r"measuring$",
    ):
        assert any(re.match(wanted, line) for line in told), f"{wanted} is not there, or not in its place"


def test_a_library_user_is_told_nothing(tiny_facts: EditSet, own: str, capfd: pytest.CaptureFixture[str]) -> None:
    editor = Editor.from_pretrained(MODEL, preset=own)
    editor.edit(tiny_facts[:2], batch_size=1)
    editor.evaluate(fluency_prompts=0)
    assert capfd.readouterr() == ("", "")


def test_bars_stay_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_lines(open_console()) is not None
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert open_lines(open_console()) is None


def test_a_warning_is_one_line(own: str) -> None:
    """`own` keeps the cache out of the way: stored second moments are not computed again."""
    command = [sys.executable, "-m", "fastedit", "stats", MODEL, "--layers", "1", "--moments", TEXT]
    done = subprocess.run([*command, "--moment-tokens", "100"], capture_output=True, text=True, cwd=TINY.parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("layer 1: trace ")
    assert done.stderr.splitlines()[:2] == [
        f"loading {MODEL}",
        "WARNING: second moments of 100 tokens have no full rank, since d_ff is 192: systems may not be solvable; read"
        " more",
    ]
