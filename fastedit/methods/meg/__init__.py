"""MeG, massive editing by generated neurons: one extra neuron per prompt, from a diffusion model, behind a gate.

Unlike the methods of `METHODS` it writes no weight: the neurons run beside the model. So it is an object of its own,
`MeG` (editor.py). One file per part: neuron, fit (with passes), encoder, familiarity (the gate), generator (with
diffusion), store, serve, metrics. stages makes a store from edits, stage by stage, and keeps what is finished. config
has the settings.
"""

from __future__ import annotations

from fastedit.methods.meg.config import CONFIGS, MegConfig
from fastedit.methods.meg.editor import MeG, MegRun
from fastedit.methods.meg.metrics import SixMetrics
from fastedit.methods.meg.store import BadStore, Store

__all__ = ["CONFIGS", "BadStore", "MeG", "MegConfig", "MegRun", "SixMetrics", "Store"]
