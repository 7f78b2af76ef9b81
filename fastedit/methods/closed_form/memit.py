"""MEMIT, mass-editing memory (Meng et al. 2023): one closed-form sweep over the layers, every edit, every neuron.

    Delta = R^T K (lambda C + K^T K)^-1         each batch forgets the ones before it
    Delta = R^T K (lambda C + H + K^T K)^-1     with memory=True: past keys are held in place (MEMIT-seq, ENCORE)
Values are optimised on the present weights, as published. The released MEMIT-seq fails: its history is passed on
nowhere; here H enters the solve.
"""

from __future__ import annotations

from pathlib import Path

from fastedit.methods.closed_form.config import MEMITConfig
from fastedit.methods.closed_form.derived import LAYER_SWEEP, memit_settings
from fastedit.methods.closed_form.recipe import Batch, BatchResult, ClosedFormMethod, one_round, ridge


def memit(batch: Batch[MEMITConfig]) -> BatchResult:
    """Write one batch inside its trial."""
    result = one_round(batch)

    if not batch.config.memory:
        result.keys.clear()
    return result


MEMIT = ClosedFormMethod(
    name="memit",
    config_class=MEMITConfig,
    presets=Path(__file__).parent / "presets" / "memit",
    derive=memit_settings,
    sweep=LAYER_SWEEP,
    recipe=memit,
    solver=ridge,
)
