"""Settings of the methods that write single columns, for a model without a preset, in units that carry over.

| setting | unit | where the factor comes from |
| --- | --- | --- |
| frozen layers | share of the depth | 3 of 32 released for FiNE; 10 of 30 chosen for KNE on SmolLM2 |
| learning rate | rms of an element of W | 0.005 and 0.001 on SmolLM2, where it is 0.19 |
| weight of the norm of a change | its inverse | 0.1 released, kept in a sweep on SmolLM2 |

A column that is changed by a share of its own length changes what its neuron writes by that share, in every model. All
other settings are shares, probabilities or counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastedit.methods.base import Sweep
from fastedit.methods.columns.config import FiNEConfig, KNEConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.runtime.words import two_digits

FINE_FROZEN, KNE_FROZEN = 0.1, 1 / 3
FINE_LR, KNE_LR = 0.026, 0.0053
NORM_FACTOR = 0.019


def fine_settings(model: ModelAdapter, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `FiNEConfig`. changes: what the caller sets, without use here"""
    rms = column_rms(model)
    train = {"lr": two_digits(FINE_LR * rms), "norm_factor": two_digits(NORM_FACTOR / rms)}
    return {"frozen_layers": int(FINE_FROZEN * model.n_layers), "train": train}


def kne_settings(model: ModelAdapter, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `KNEConfig`. changes: what the caller sets, without use here"""
    return {
        "frozen_layers": int(KNE_FROZEN * model.n_layers),
        "attribution": {"nodes": 1},
        "train": {"lr": two_digits(KNE_LR * column_rms(model))},
    }


def kn_settings(model: ModelAdapter, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `KNConfig`: all of them are shares, so none depends on the model."""
    return {}


def _rates(model: ModelAdapter, config: FiNEConfig | KNEConfig) -> list[float]:
    """A third of the learning rate, and three times as much."""
    return [two_digits(config.train.lr / 3), two_digits(config.train.lr * 3)]


RATE_SWEEP = Sweep("train.lr", _rates)


@torch.no_grad()
def column_rms(model: ModelAdapter) -> float:
    """Root mean square of an element of W in the median neuron: of the columns of a layer, then of the layers."""
    norms = [model.down_weight(layer).float().norm(dim=0).median().cpu() for layer in range(model.n_layers)]
    return float(torch.stack(norms).median()) / model.d_model**0.5
