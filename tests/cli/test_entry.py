"""The ways into the command: `fastedit`, `python -m fastedit`, its version, and what a shell completes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastedit import __version__
from fastedit.cli.main import app

ROOT = Path(__file__).resolve().parents[2]


def module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastedit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def test_the_module_is_the_command() -> None:
    done = module("--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: fastedit [OPTIONS] COMMAND" in done.stdout
    assert module("edit").returncode == 2


def test_the_version_is_one_line_without_torch() -> None:
    done = module("--version", PYTHONPROFILEIMPORTTIME="1")
    assert done.stdout == f"fastedit {__version__}, torch {version('torch')}, transformers {version('transformers')}\n"
    assert "torch.nn" not in done.stderr


def test_bash_completes_commands_and_options() -> None:
    # Else typer looks for the shell that started it, which under make is sh.
    script = module("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout
    assert "_fastedit_completion" in script
    assert "_FASTEDIT_COMPLETE=complete_bash" in script

    for words, wanted in (("fastedit ex", "export"), ("fastedit edit model records --dev", "--device")):
        done = module(_FASTEDIT_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
        assert done.stdout.split() == [wanted]


@pytest.mark.parametrize("command", ["edit", "eval", "stats", "locate", "demo", "diff", "undo", "replay", "export"])
def test_every_command_that_loads_a_model_has_a_device(command: str) -> None:
    assert "--device" in CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
