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
    from fastedit.evaluation.metrics import compare, evaluate
    from fastedit.methods.base import Method
    from fastedit.methods.closed_form.config import AlphaEditConfig, MEMITConfig, NSEConfig
    from fastedit.methods.columns.config import FiNEConfig, KNConfig, KNEConfig
    from fastedit.methods.meg import MeG, MegConfig
    from fastedit.methods.presets import load_preset
    from fastedit.methods.registry import METHODS
    from fastedit.model.background_text import Source
    from fastedit.model.load import load_model
    from fastedit.records.edit import Edit, EditSet, InvalidEdits, Probe
    from fastedit.records.load import load_edits
    from fastedit.runs.log import RunError
    from fastedit.runs.reports import BatchRejected, Run
    from fastedit.weights.apply import RejectedUpdate

__version__ = "0.1.0"

_HOME = {
    "Guard": "fastedit.editing.guard",
    "Watch": "fastedit.editing.watch",
    "Editor": "fastedit.editor",
    "compare": "fastedit.evaluation.metrics",
    "evaluate": "fastedit.evaluation.metrics",
    "Method": "fastedit.methods.base",
    "AlphaEditConfig": "fastedit.methods.closed_form.config",
    "MEMITConfig": "fastedit.methods.closed_form.config",
    "NSEConfig": "fastedit.methods.closed_form.config",
    "FiNEConfig": "fastedit.methods.columns.config",
    "KNConfig": "fastedit.methods.columns.config",
    "KNEConfig": "fastedit.methods.columns.config",
    "MeG": "fastedit.methods.meg",
    "MegConfig": "fastedit.methods.meg",
    "load_preset": "fastedit.methods.presets",
    "METHODS": "fastedit.methods.registry",
    "Source": "fastedit.model.background_text",
    "load_model": "fastedit.model.load",
    "Edit": "fastedit.records.edit",
    "EditSet": "fastedit.records.edit",
    "InvalidEdits": "fastedit.records.edit",
    "Probe": "fastedit.records.edit",
    "load_edits": "fastedit.records.load",
    "RunError": "fastedit.runs.log",
    "BatchRejected": "fastedit.runs.reports",
    "Run": "fastedit.runs.reports",
    "RejectedUpdate": "fastedit.weights.apply",
}

__all__ = [
    "METHODS",
    "AlphaEditConfig",
    "BatchRejected",
    "Edit",
    "EditSet",
    "Editor",
    "FiNEConfig",
    "Guard",
    "InvalidEdits",
    "KNConfig",
    "KNEConfig",
    "MEMITConfig",
    "MeG",
    "MegConfig",
    "Method",
    "NSEConfig",
    "Probe",
    "RejectedUpdate",
    "Run",
    "RunError",
    "Source",
    "Watch",
    "__version__",
    "compare",
    "evaluate",
    "load_edits",
    "load_model",
    "load_preset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastedit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
