"""NSE, neuron-level sequential editing (Jiang et al. 2025): closed-form updates of the neurons with the largest
activation mass, over several layers and rounds, towards values optimised on the original weights.

    Delta[:, S] = R^T K_S (lambda C[S, S] + H[S, S] + K_S^T K_S)^-1
Differences from the released code, each on purpose: targets get their leading space in the value optimisation too;
values and keys share one set of templates; the smallest neuron set reaching the share is taken (`as_released=True`
takes the largest within it). An edit already near its value is skipped in a round, yet its key enters the history.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from fastedit.methods.closed_form.config import NSEConfig
from fastedit.methods.closed_form.derived import LAYER_SWEEP, nse_settings
from fastedit.methods.closed_form.recipe import Batch, BatchResult, ClosedFormMethod, ridge, write_sweep
from fastedit.methods.closed_form.selection import active_edits, mass_rule


def nse(batch: Batch[NSEConfig]) -> BatchResult:
    """Write one batch inside its trial."""
    config = batch.config
    near = partial(active_edits, smallest=config.residual_min, largest=config.residual_max)
    heavy = mass_rule(config.mass, config.as_released)
    result = BatchResult(batch.values())

    with batch.model.packed():
        sweep = batch.sweep()
        for _ in range(config.rounds):
            if not write_sweep(batch, sweep, result, near, heavy):
                break
    return result


NSE = ClosedFormMethod(
    name="nse",
    config_class=NSEConfig,
    presets=Path(__file__).parent / "presets" / "nse",
    derive=nse_settings,
    sweep=LAYER_SWEEP,
    recipe=nse,
    solver=ridge,
)
