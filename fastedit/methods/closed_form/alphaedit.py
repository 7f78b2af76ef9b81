"""AlphaEdit (Fang et al. 2025): updates projected onto the null space of the background keys, past keys held in place.

    Delta = R^T X^T,  X = (P (K^T K + H) + b I)^-1 P K^T,  P the projector on the eigenvectors of C below a threshold
Values are optimised on the present weights, as published. The projector comes from a symmetric eigensolver and is
never formed: the system is solved in its range (see `solver.NullSpaceSolver`). The threshold is the released code's
0.02; the paper's footnote says 0.01.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastedit.methods.closed_form.config import AlphaEditConfig
from fastedit.methods.closed_form.derived import LAYER_SWEEP, alphaedit_settings
from fastedit.methods.closed_form.null_space import null_space
from fastedit.methods.closed_form.recipe import ClosedFormMethod, one_round
from fastedit.methods.closed_form.solver import NullSpaceSolver


def projected(moment: Tensor, config: AlphaEditConfig) -> NullSpaceSolver:
    """The ridge system inside the null space of C. moment: (d_ff, d_ff)"""
    threshold, ridge = config.null_threshold, config.ridge
    if config.units == "trace":
        trace = float(moment.diagonal().sum(dtype=torch.float64))
        threshold, ridge = threshold * trace / len(moment), ridge * trace

    return NullSpaceSolver(null_space(moment, threshold), ridge)


ALPHAEDIT = ClosedFormMethod(
    name="alphaedit",
    config_class=AlphaEditConfig,
    presets=Path(__file__).parent / "presets" / "alphaedit",
    derive=alphaedit_settings,
    sweep=LAYER_SWEEP,
    recipe=one_round,
    solver=projected,
)
