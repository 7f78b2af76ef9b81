"""What a run directory says of the machine and the installation that wrote it."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from fastedit import __version__
from fastedit.runs.identity import machine

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_says_which_release_wrote_it() -> None:
    """The distribution has another name than the package."""
    (name,) = re.findall(r'^name = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert machine()["fastedit"] == version(name) == __version__
