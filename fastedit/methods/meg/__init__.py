"""MeG, massive editing by generated neurons: one extra neuron per prompt, from a diffusion model, behind a gate.

Unlike the methods of `METHODS` it writes no weight and runs beside the model, so it is an object of its own, `MeG`
(editor.py). One file per part: neuron, fit (with passes), encoder, familiarity, generator (with diffusion), serve,
store, metrics; stages runs them in order and keeps finished stages.
"""

from __future__ import annotations

from fastedit.methods.meg.config import CONFIGS, MegConfig
from fastedit.methods.meg.editor import MeG, MegRun
from fastedit.methods.meg.metrics import SixMetrics
from fastedit.methods.meg.store import BadStore, Store

__all__ = ["CONFIGS", "BadStore", "MeG", "MegConfig", "MegRun", "SixMetrics", "Store"]
