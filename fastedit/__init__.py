"""fastedit: changes facts inside transformer language models, thousands of them, fast, without breaking the rest.

The names below are imported when they are first used, so `import fastedit` is instant and has no side effects.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastedit.editing.guard import Guard
    from fastedit.editing.watch import Watch
    from fastedit.editor import Editor
    from fastedit.evaluation.metrics import evaluate
    from fastedit.methods.meg import MeG
    from fastedit.methods.registry import RECIPES
    from fastedit.model.background_text import Source
    from fastedit.records.edit import Edit, EditSet, InvalidEdits, Probe
    from fastedit.records.load import load_edits
    from fastedit.runs.log import RunError
    from fastedit.runs.reports import BatchRejected

__version__ = "0.1.0"

_HOME = {
    "Edit": "fastedit.records.edit",
    "EditSet": "fastedit.records.edit",
    "InvalidEdits": "fastedit.records.edit",
    "Probe": "fastedit.records.edit",
    "Editor": "fastedit.editor",
    "BatchRejected": "fastedit.runs.reports",
    "Guard": "fastedit.editing.guard",
    "RunError": "fastedit.runs.log",
    "evaluate": "fastedit.evaluation.metrics",
    "load_edits": "fastedit.records.load",
    "MeG": "fastedit.methods.meg",
    "RECIPES": "fastedit.methods.registry",
    "Source": "fastedit.model.background_text",
    "Watch": "fastedit.editing.watch",
}

__all__ = [
    "RECIPES",
    "BatchRejected",
    "Edit",
    "EditSet",
    "Editor",
    "Guard",
    "InvalidEdits",
    "MeG",
    "Probe",
    "RunError",
    "Source",
    "Watch",
    "__version__",
    "evaluate",
    "load_edits",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastedit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
