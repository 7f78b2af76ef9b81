"""MeG, massive editing by generated neurons: one extra neuron per prompt, from a diffusion model, behind a gate.

Unlike the other methods it writes no weight and has a run-time part, so it is no recipe of `RECIPES` but an object of
its own, `MeG`. A file per stage: neuron, fit (with passes), encoder, familiarity, generator (with diffusion), serve,
store; stages runs them and keeps what is done, metrics measures, massive is the face.
"""

from __future__ import annotations

from fastedit.methods.meg.config import CONFIGS, MegConfig
from fastedit.methods.meg.editor import MeG, MegRun
from fastedit.methods.meg.metrics import SixMetrics
from fastedit.methods.meg.store import BadStore, Store

__all__ = ["CONFIGS", "BadStore", "MeG", "MegConfig", "MegRun", "SixMetrics", "Store"]
