"""fastedit: changes facts inside transformer language models, thousands of them, fast, without breaking the rest.

The names below are imported when they are first used, so `import fastedit` is instant and has no side effects.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastedit.editor import Editor
    from fastedit.edits import Edit, EditSet, InvalidEdits, Probe
    from fastedit.evaluation import evaluate
    from fastedit.guards import Guard
    from fastedit.readers import load_edits
    from fastedit.recipes import RECIPES
    from fastedit.recipes.meg import MeG
    from fastedit.reports import BatchRejected
    from fastedit.runlog import RunError
    from fastedit.stats import Source
    from fastedit.watch import Watch

__version__ = "0.1.0"

_HOME = {
    "Edit": "fastedit.edits",
    "EditSet": "fastedit.edits",
    "InvalidEdits": "fastedit.edits",
    "Probe": "fastedit.edits",
    "Editor": "fastedit.editor",
    "BatchRejected": "fastedit.reports",
    "Guard": "fastedit.guards",
    "RunError": "fastedit.runlog",
    "evaluate": "fastedit.evaluation",
    "load_edits": "fastedit.readers",
    "MeG": "fastedit.recipes.meg",
    "RECIPES": "fastedit.recipes",
    "Source": "fastedit.stats",
    "Watch": "fastedit.watch",
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
