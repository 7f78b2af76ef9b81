"""MeG, massive editing by generated neurons: one extra neuron per prompt, from a diffusion model, behind a gate.

Unlike the other methods it writes no weight and has a run-time part, so it is no recipe of `RECIPES` but an object of
its own, `MeG`. A file per stage: neuron, fit (with passes), encoder, familiarity, generator (with diffusion), serve,
store; stages runs them and keeps what is done, metrics measures, massive is the face.
"""

from __future__ import annotations

from fastedit.recipes.meg.config import CONFIGS, MegConfig
from fastedit.recipes.meg.massive import MeG, MegRun
from fastedit.recipes.meg.metrics import SixMetrics
from fastedit.recipes.meg.store import BadStore, Store

__all__ = ["CONFIGS", "BadStore", "MeG", "MegConfig", "MegRun", "SixMetrics", "Store"]
