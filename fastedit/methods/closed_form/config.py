"""Settings of the closed-form methods."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from fastedit.config import Config, EditConfig, Layers, MomentConfig
from fastedit.runtime.words import shown


class ValueConfig(Config):
    """Value optimisation (see :mod:`fastedit.methods.closed_form.values`).

    steps: forwards, counted as the published code does: `steps` forwards, `steps - 1` Adam steps
    lr: learning rate of Adam
    weight_decay: weight of the norm of delta, relative to the squared norm of the unedited value
    kl_factor: weight of the drift KL at the end of "{subject} is a"
    clamp: largest ||delta||, relative to the norm of the unedited value; inf = no bound
    stop_loss: an edit is finished when its loss falls below this
    stop_after_top1: ours, after ENCORE's rule: an edit is finished when every target token has ranked first in every
        context for this many steps in a row; None = never
    token_budget: live rows optimised together, which bounds memory
    dtype: of the layers above the value layer while values are optimised. "model", or "float32" or "bfloat16", for
        which a copy of these layers is kept. "auto" is "model", but "float32" for a float16 model on a CPU, where
        float16 products are emulated (fifty times slower in the backward pass). The change delta, Adam, softmax and
        loss are always float32
    """

    steps: int = Field(20, ge=2)
    lr: float = Field(0.5, gt=0)
    weight_decay: float = Field(0.5, ge=0)
    kl_factor: float = Field(0.0625, ge=0)
    clamp: float = Field(0.75, gt=0, allow_inf_nan=True)
    stop_loss: float = Field(0.05, ge=0)
    stop_after_top1: int | None = Field(None, ge=1)
    token_budget: int = Field(768, ge=1)
    dtype: Literal["auto", "model", "float32", "bfloat16"] = "auto"


class TemplateConfig(Config):
    """Context templates: the plain template, and one beginning sampled after each seed word.

    seeds: words that the beginnings start with
    length: tokens of a beginning, its seed included
    top_k: tokens are sampled from the k most probable ones
    """

    seeds: tuple[str, ...] = ("The", "Therefore", "Because", "I", "You")
    length: int = Field(10, ge=2)
    top_k: int = Field(5, ge=1)


class ClosedFormConfig(EditConfig):
    """What every closed-form method needs.

    layers: edited layers, ascending; the last one is the value layer
    rewind_values: optimise values on the original weights throughout a stream; otherwise on the current weights
    """

    layers: Layers = Field(min_length=1)
    value: ValueConfig = ValueConfig()
    templates: TemplateConfig = TemplateConfig()
    moments: MomentConfig = MomentConfig()
    rewind_values: bool = False

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if any(layer < 0 for layer in layers) or list(layers) != sorted(set(layers)):
            raise ValueError(f"layers must be ascending, without repeats, from 0 on, got {shown(list(layers))}")
        return layers


class NSEConfig(ClosedFormConfig):
    """NSE, neuron-level sequential editing (sections and symbols: Jiang et al. 2025 and its released code).

    covariance_weight: lambda, weight of the second moment C in the solve
    mass: p, share of the summed |key| that the selected neurons must reach; 1 selects every neuron
    rounds: writes per batch (the released max_iterations - 1)
    residual_min, residual_max: an edit takes part in a round when residual_min < ||z - h|| < residual_max; in a
        post-norm model z - h is what the output of the value layer's down-projection lacks, with one layer or several
    as_released: the released code's choices where they differ from the paper: the longest prefix not above p
    """

    covariance_weight: float = Field(gt=0)
    mass: float = Field(1.0, gt=0, le=1)
    rounds: int = Field(2, ge=1)
    residual_min: float = Field(0.0, ge=0)
    residual_max: float = Field(float("inf"), gt=0, allow_inf_nan=True)
    rewind_values: bool = True
    as_released: bool = False


class MEMITConfig(ClosedFormConfig):
    """MEMIT (Meng et al. 2023).

    covariance_weight: lambda, weight of the second moment C in the solve
    memory: hold the keys of all past edits in place (MEMIT-seq); without it each batch forgets the ones before
    """

    covariance_weight: float = Field(gt=0)
    memory: bool = False


class AlphaEditConfig(ClosedFormConfig):
    """AlphaEdit (Fang et al. 2025).

    null_threshold: eigenvectors of C with eigenvalues below it span the null space
    ridge: b, the released L2
    units: of both. "absolute" as published. "trace", ours: the threshold in mean eigenvalues, the ridge in traces of
        the layer's C, since the keys of two layers of one model may differ tenfold in their squares
    """

    null_threshold: float = Field(0.02, gt=0)
    ridge: float = Field(10.0, gt=0)
    units: Literal["absolute", "trace"] = Field("absolute", json_schema_extra={"before": "absolute"})
