"""Typed settings of the methods, and the presets that ship as data.

A preset is a YAML file `presets/<method>/<name>.yaml`: `origin` says where its numbers come from, `model` is the shape
it was made for, `config` the fields of the method's config; an unknown field is an error naming it.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ValueConfig(_Config):
    """Value optimisation (see :mod:`fastedit.target`).

    steps counts forwards as the published code does: `steps` forwards, `steps - 1` Adam steps.
    stop_loss: an edit is finished when its loss falls below. stop_after_top1: ours after ENCORE's rule: finished when
    every target token has ranked first in every context for this many steps in a row; None = never.
    token_budget: live rows optimised together, which bounds memory.
    """

    steps: int = Field(20, ge=2)
    lr: float = Field(0.5, gt=0)
    weight_decay: float = Field(0.5, ge=0)
    kl_factor: float = Field(0.0625, ge=0)
    clamp: float = Field(0.75, gt=0)
    stop_loss: float = Field(0.05, ge=0)
    stop_after_top1: int | None = Field(None, ge=1)
    token_budget: int = Field(768, ge=1)


class TemplateConfig(_Config):
    """Context templates: sampled beginnings, `length` tokens in all, top-k sampling, plus the plain template."""

    seeds: tuple[str, ...] = ("The", "Therefore", "Because", "I", "You")
    length: int = Field(10, ge=2)
    top_k: int = Field(5, ge=1)


class MomentConfig(_Config):
    """Second moments: how many tokens, and the longest text window, both in tokens."""

    tokens: int = Field(100_000, ge=1)
    window: int = Field(256, ge=8)
    token_budget: int = Field(1024, ge=8)


class NSEConfig(_Config):
    """NSE, neuron-level sequential editing (sections and symbols: Jiang et al. 2025 and its released code).

    layers: edited layers, ascending; the last one is the value layer
    covariance_weight: lambda, weight of the second moment C in the solve
    mass: p, share of the summed |key| that the selected neurons must reach; 1 selects every neuron
    rounds: writes per batch (the released max_iterations - 1)
    residual_min, residual_max: an edit takes part in a round when residual_min < ||z - h|| < residual_max
    rewind_values: optimise values on the original weights, also in the middle of a stream
    as_released: the released code's choices where they differ from the paper: the longest prefix not above p
    """

    layers: tuple[int, ...] = Field(min_length=1)
    value: ValueConfig = ValueConfig()
    templates: TemplateConfig = TemplateConfig()
    moments: MomentConfig = MomentConfig()
    covariance_weight: float = Field(gt=0)
    mass: float = Field(1.0, gt=0, le=1)
    rounds: int = Field(2, ge=1)
    residual_min: float = Field(0.0, ge=0)
    residual_max: float = Field(float("inf"), gt=0)
    rewind_values: bool = True
    as_released: bool = False

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if any(layer < 0 for layer in layers) or list(layers) != sorted(set(layers)):
            raise ValueError(f"layers must be ascending, without repeats, from 0 on, got {list(layers)}")
        return layers


CONFIGS: dict[str, type[NSEConfig]] = {"nse": NSEConfig}


def presets(method: str) -> list[str]:
    """Names of the presets that ship for `method`. Raises ValueError for an unknown method."""
    if method not in CONFIGS:
        raise ValueError(f"method must be one of {', '.join(sorted(CONFIGS))}, got {method!r}")
    folder = resources.files("fastedit") / "presets" / method
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_preset(method: str, name: str, **changes: Any) -> NSEConfig:
    """The preset `name` of `method` with `changes` applied.

    Raises ValueError for an unknown method or preset (listing those that exist) or a value that does not fit."""
    if name not in presets(method):
        raise ValueError(f"{method}: no preset {name!r}; there are {', '.join(presets(method))}")
    return CONFIGS[method].model_validate({**_read(method, name)["config"], **changes})


def preset_for(method: str, n_layers: int, d_model: int, d_ff: int) -> NSEConfig:
    """The preset of `method` made for a model of this shape. Raises ValueError, listing the presets, when none is."""
    shape = {"n_layers": n_layers, "d_model": d_model, "d_ff": d_ff}
    for name in presets(method):
        if _read(method, name)["model"] == shape:
            return load_preset(method, name)
    raise ValueError(
        f"{method}: no preset was made for a model of {shape}; pass config= or preset= one of"
        f" {', '.join(presets(method))}"
    )


def _read(method: str, name: str) -> dict[str, Any]:
    text = (resources.files("fastedit") / "presets" / method / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
