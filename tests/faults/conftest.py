"""Shared by the fault tests: a small run on the tiny model, and what it must end as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastedit.editor import Editor
from fastedit.edits import EditSet

BATCH = 3
N_EDITS = 15
FAST: dict[str, dict[str, Any]] = {
    "fine": {"train": {"steps": 4}},
    "kne": {"train": {"steps": 4}, "fixed": True, "attribution": {"nodes": 2}},
    # Few neurons: KN soon multiplies the norm of a small layer, which a guard refuses.
    "kn": {"attribution": {"nodes": 2}, "threshold": 0.7},
}
CLOSED_FORM = {"value": {"steps": 4, "lr": 0.1}}


@pytest.fixture
def fast_editor(tiny_editor: Callable[..., Editor]) -> Callable[..., Editor]:
    """Editors on fresh copies of the tiny model whose batches take a tenth of a second."""

    def make(method: str = "nse", **changes: Any) -> Editor:
        return tiny_editor(method, **{**FAST.get(method, CLOSED_FORM), **changes})

    return make


@pytest.fixture
def stream(tiny_facts: EditSet) -> EditSet:
    """Five batches of three edits."""
    return tiny_facts[:N_EDITS]


@pytest.fixture
def finished(fast_editor: Callable[..., Editor], stream: EditSet, tmp_path: Path) -> Path:
    """A run directory with all five batches of the stream."""
    editor = fast_editor()
    editor.edit(stream, BATCH, run_dir=tmp_path / "finished")
    return tmp_path / "finished"
