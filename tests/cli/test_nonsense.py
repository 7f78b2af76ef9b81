"""Nonsense on the command line: one error in words, no traceback, and the exit code of wrong input."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastedit.cli.main import app

TINY = Path(__file__).resolve().parents[1] / "tiny"
MODEL, FACTS, TEXT = str(TINY / "model"), str(TINY / "facts.jsonl"), str(TINY / "text.txt")
OWN = "config: {layers: 2-4, covariance_weight: 100, value: {steps: 3}, moments: {tokens: 2048}}"
KINDS = {
    "gone": r"[Nn]o such file",
    "folder": r"is a folder|Is a directory",
    "empty": r"is empty|no text to|a preset must hold",
    "pipe": r"is a pipe or a device",
    "binary": r"must be UTF-8|zero bytes",
}
EDIT = ("edit", MODEL, FACTS, "--limit", "1", "--preset", "own.yaml", "--moments", TEXT, "--no-eval")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that holds each kind of file under each suffix that a command wants."""
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(OWN, encoding="utf-8")
    Path("file").write_text("file\n", encoding="utf-8")
    Path("five.txt").write_text("A river runs by the mill.", encoding="utf-8")
    for suffix in (".jsonl", ".txt", ".yaml"):
        Path(f"folder{suffix}").mkdir()
        Path(f"empty{suffix}").touch()
        os.mkfifo(f"pipe{suffix}")
        Path(f"binary{suffix}").write_bytes(b"\x00\x01\x02\xff")


def told(*arguments: str) -> str:
    """The error, from which the panel of a usage error is taken away."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "pydantic" not in done.stderr
    return " ".join(re.sub(r"[│─╭╮╰╯]", " ", done.stderr).split())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "arguments",
    [
        ("edit", MODEL, "{}.jsonl"),
        ("eval", MODEL, "{}.jsonl"),
        (*EDIT, "--moments", "{}.txt"),
        ("edit", MODEL, FACTS, "--limit", "1", "--preset", "own.yaml", "--text", "{}.txt"),
        ("eval", MODEL, FACTS, "--limit", "1", "--text", "{}.txt"),
        ("stats", MODEL, "--layers", "1", "--moments", "{}.txt"),
        (*EDIT, "--preset", "{}.yaml"),
        ("stats", MODEL, "--preset", "{}.yaml"),
        ("edit", MODEL, FACTS, "--limit", "1", "--method", "meg", "--others", "{}.jsonl"),
    ],
    ids=["records", "eval", "moments", "text", "eval text", "stats moments", "preset", "stats preset", "others"],
)
def test_a_file_that_is_none(arguments: tuple[str, ...], kind: str) -> None:
    wanted = next(part for part in arguments if "{}" in part).format(kind)
    error = told(*(part.format(kind) if "{}" in part else part for part in arguments))
    assert wanted in error
    assert re.search(KINDS[kind], error), error
    assert "loading" not in error


@pytest.mark.parametrize("run_dir", ["gone", "folder.txt", "file", "pipe.txt", "file/below"])
@pytest.mark.parametrize(
    "command",
    [("log",), ("diff",), ("undo", "--last", "1"), ("replay", "--save", "s"), ("export", "e")],
    ids=lambda command: command[0],
)
def test_a_run_directory_that_is_none(command: tuple[str, ...], run_dir: str) -> None:
    name, *rest = command
    assert run_dir in told(name, run_dir, *rest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "No such command 'nonsense'"),
        ((*EDIT, "--unknown"), "No such option: --unknown"),
        ((*EDIT, "--method", "magic"), "'magic' is not one of 'nse'"),
        ((*EDIT, "--form", "magic"), "form must be one of auto, plain"),
        ((*EDIT, "--target-field", "magic"), "must be one of"),
        ((*EDIT, "--limit", "0"), "Invalid value for '--limit'"),
        ((*EDIT, "--limit", "x"), "Invalid value for '--limit'"),
        ((*EDIT, "--start", "-1"), "Invalid value for '--start'"),
        ((*EDIT, "--start", "100000"), "none at start=100000"),
        ((*EDIT, "--batch-size", "0"), "Invalid value for '--batch-size'"),
        ((*EDIT, "--watch", "0"), "Invalid value for '--watch'"),
        ((*EDIT, "--canaries", "-1"), "Invalid value for '--canaries'"),
        ((*EDIT, "--moment-tokens", "0"), "Invalid value for '--moment-tokens'"),
        ((*EDIT, "--seed", "99999999999999999999"), "Invalid value for '--seed'"),
        ((*EDIT, "--max-growth", "nan"), "wanted max_growth > 1"),
        ((*EDIT, "--max-growth", "-1"), "wanted max_growth > 1"),
        ((*EDIT, "--dtype", "float8"), "'float8' is not one of"),
        ((*EDIT, "--set", "layers=4-99"), "layers must"),
        ((*EDIT, "--resume"), "--resume needs --run-dir"),
        ((*EDIT, "--run-dir", "file"), "file"),
        ((*EDIT, "--run-dir", "file/below"), "file/below"),
        ((*EDIT, "--moments", "five.txt"), "tokens, and 2 048 are to be read"),
        (("stats", MODEL, "--layers", "1", "--moments", "five.txt"), "tokens, and 30 000 are to be read"),
        (("stats", MODEL, "--layers", "-1"), "--layers must be a list of layers"),
        (("stats", MODEL, "--layers", ""), "--layers must be a list of layers"),
        (("stats", MODEL, "--layers", "8"), "--layers must lie in 0-7, got 8"),
        (("stats", MODEL, "--method", "magic"), "method must be one of"),
        (("locate", MODEL, "--prompt", "", "--target", "x"), "prompt"),
        (("locate", MODEL, "--prompt", "x", "--target", ""), "target"),
        (("locate", MODEL, "--prompt", "a", "--target", "b", "--frozen-layers", "99"), "frozen_layers"),
        (("locate", MODEL, "--prompt", "a", "--target", "b", "--plot", "file/below.png"), "file/below.png"),
        (("eval", MODEL, FACTS, "--meg", "gone"), "gone"),
        (("eval", MODEL, FACTS, "--meg", "binary.txt"), "binary.txt"),
        (("undo", "gone"), "say one of --last N"),
        (("undo", "gone", "--last", "0"), "Invalid value for '--last'"),
        (("export", "gone", "e", "--format", "magic"), "'magic' is not one of"),
        (("export", "gone", "e", "--rank", "0"), "Invalid value for '--rank'"),
        (("demo", "--n-edits", "0"), "Invalid value for '--n-edits'"),
        (("demo", "--model", "gone/gone/gone"), "no model at gone/gone/gone"),
    ],
    ids=lambda value: " ".join(part for part in value if part not in EDIT) if isinstance(value, tuple) else None,
)
def test_an_option_that_is_none(arguments: tuple[str, ...], message: str) -> None:
    assert message in told(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [(*EDIT, "--save", "file/below"), (*EDIT, "--set", "value.lr=1e300")],
    ids=["save below a file", "a rate beyond float"],
)
def test_what_fails_late_is_told_without_a_traceback(arguments: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code in (1, 2), (done.output, done.exception)
    assert "error: " in done.stderr
