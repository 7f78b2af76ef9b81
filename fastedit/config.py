"""Typed settings of the methods, and the presets that ship as data.

A preset is a YAML file `presets/<method>/<name>.yaml`: `origin` says where its numbers come from, `model` is the shape
it was made for, `config` the fields of the method's config; an unknown field is an error naming it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ValueConfig(_Config):
    """Value optimisation (see :mod:`fastedit.target`).

    steps counts forwards as the published code does: `steps` forwards, `steps - 1` Adam steps.
    stop_loss: an edit is finished when its loss falls below. stop_after_top1: ours after ENCORE's rule: finished when
    every target token has ranked first in every context for this many steps in a row; None = never.
    token_budget: live rows optimised together, which bounds memory.
    dtype: of the layers above the value layer while values are optimised: "model", or "float32" or "bfloat16", for
    which a copy of them is kept; "auto" is "model", but float32 for a float16 model on a CPU, where float16 products
    are emulated (fifty times slower in the backward pass). The change delta, Adam, softmax and loss are float32 in any
    case.
    """

    steps: int = Field(20, ge=2)
    lr: float = Field(0.5, gt=0)
    weight_decay: float = Field(0.5, ge=0)
    kl_factor: float = Field(0.0625, ge=0)
    clamp: float = Field(0.75, gt=0)
    stop_loss: float = Field(0.05, ge=0)
    stop_after_top1: int | None = Field(None, ge=1)
    token_budget: int = Field(768, ge=1)
    dtype: Literal["auto", "model", "float32", "bfloat16"] = "auto"


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


class EditConfig(_Config):
    """The settings of a method; what a method has none of its own for, no method shares."""


class ClosedFormConfig(EditConfig):
    """What every closed-form recipe needs.

    layers: edited layers, ascending; the last one is the value layer
    rewind_values: optimise values on the original weights, also in the middle of a stream
    """

    layers: tuple[int, ...] = Field(min_length=1)
    value: ValueConfig = ValueConfig()
    templates: TemplateConfig = TemplateConfig()
    moments: MomentConfig = MomentConfig()
    rewind_values: bool = False

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if any(layer < 0 for layer in layers) or list(layers) != sorted(set(layers)):
            raise ValueError(f"layers must be ascending, without repeats, from 0 on, got {list(layers)}")
        return layers


class NSEConfig(ClosedFormConfig):
    """NSE, neuron-level sequential editing (sections and symbols: Jiang et al. 2025 and its released code).

    covariance_weight: lambda, weight of the second moment C in the solve
    mass: p, share of the summed |key| that the selected neurons must reach; 1 selects every neuron
    rounds: writes per batch (the released max_iterations - 1)
    residual_min, residual_max: an edit takes part in a round when residual_min < ||z - h|| < residual_max
    as_released: the released code's choices where they differ from the paper: the longest prefix not above p
    """

    covariance_weight: float = Field(gt=0)
    mass: float = Field(1.0, gt=0, le=1)
    rounds: int = Field(2, ge=1)
    residual_min: float = Field(0.0, ge=0)
    residual_max: float = Field(float("inf"), gt=0)
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
    """

    null_threshold: float = Field(0.02, gt=0)
    ridge: float = Field(10.0, gt=0)


class TrainConfig(_Config):
    """Training of chosen columns (see :mod:`fastedit.columns`).

    steps: at most so many Adam steps; stop_probability: an edit is finished when every target token has more
    reduce: loss of the target's tokens: "worst" of them, or "mean"
    kl_factor: weight of the drift KL(p_0 || p) averaged over the prompt's positions but the last
    repetition_factor: weight of -log(1 - p) of the target's tokens after the whole target, the worst of them
    norm_factor: weight of the norm of an edit's changes
    token_budget: rows trained together, which bounds memory
    """

    steps: int = Field(50, ge=1)
    lr: float = Field(1e-3, gt=0)
    stop_probability: float = Field(0.9, gt=0, lt=1)
    reduce: Literal["worst", "mean"] = "worst"
    kl_factor: float = Field(1.0, ge=0)
    repetition_factor: float = Field(10.0, ge=0)
    norm_factor: float = Field(0.1, ge=0)
    token_budget: int = Field(1024, ge=1)


class FiNEConfig(EditConfig):
    """FiNE, fine-grained neuron-level editing (ICLR 2025, arXiv 2503.01090, and its released code).

    neurons: k, neurons chosen for each target token
    frozen_layers: the last layers, in which none is chosen
    score_activation: "down_in", the down-projection's input; "gate_only", the activation without the up projection, as
        the release scored Llama models until May 2025, probably for the paper's numbers
    token: whose push is scored at a target token. "greedy" (published): what the model says there now; ours: "old",
        the first token of `target_true` at the first target token where the record has one, greedy elsewhere
    common_share: ours: leave out neurons that would be chosen for more than this share of the positions of background
        text, which push what the model says anywhere; None = leave none out, as published
    background: that text's length; its source is the editor's `moments`, by default the model's own writing
    protect: ours, for streams: a column that an earlier batch wrote is not chosen again; as published, nothing protects
        earlier edits
    """

    neurons: int = Field(5, ge=1)
    frozen_layers: int = Field(3, ge=0)
    score_activation: Literal["down_in", "gate_only"] = "down_in"
    token: Literal["greedy", "old"] = "greedy"
    common_share: float | None = Field(None, gt=0, lt=1)
    background: MomentConfig = MomentConfig(tokens=4000, window=128)
    protect: bool = False
    train: TrainConfig = TrainConfig()


class AttributionConfig(_Config):
    """Integrated gradients of neurons (see :mod:`fastedit.attribution`).

    nodes: M of the midpoint rule
    path, tokens, everywhere: as in `integrated_gradients`; published by KN: "layer"
    answer: whose probability is attributed. "old": `target_true`, or the model's own greedy tokens where the record has
        none; "greedy": those always; "new": the target
    """

    nodes: int = Field(20, ge=1)
    path: Literal["layer", "joint"] = "layer"
    tokens: Literal["together", "apart"] = "together"
    everywhere: bool = False
    answer: Literal["old", "greedy", "new"] = "old"


class KNEConfig(EditConfig):
    """KNE, knowledge neuronal ensemble (arXiv 2412.20637). Published: integrated gradients summed over the answer's
    tokens, one quantile of the scores of all layers, W + alpha / sqrt(n) dW, training of the ensemble alone. All else
    is our reading, the source being silent.

    share: p, share of all neurons that the ensemble holds
    key_layers: None, or K: the K layers with most members, the threshold taken again inside them; or the layers
    alpha: None = sqrt(n), so that what is trained is added as it is; alpha_per: n of the "layer", or of "all"
    ensemble: "shared": one for a batch, by its summed scores, trained on the mean loss; "union": of the edits' own,
        trained likewise; "own": each edit trains its own alone, and the changes are summed
    fixed: keep the first batch's ensemble for the stream; "own" cannot
    frozen_layers: last layers without members
    train: the loss is the mean over the target's tokens; `kl_factor` adds FiNE's drift
    """

    share: float = Field(0.01, gt=0, lt=1)
    key_layers: int | tuple[int, ...] | None = None
    alpha: float | None = Field(None, gt=0)
    alpha_per: Literal["layer", "all"] = "layer"
    ensemble: Literal["shared", "union", "own"] = "shared"
    fixed: bool = False
    frozen_layers: int = Field(0, ge=0)
    attribution: AttributionConfig = AttributionConfig()
    train: TrainConfig = TrainConfig(steps=25, lr=1e-3, reduce="mean", kl_factor=0, repetition_factor=0, norm_factor=0)

    @model_validator(mode="after")
    def _one_ensemble(self) -> KNEConfig:
        if self.fixed and self.ensemble == "own":
            raise ValueError("ensemble 'own' is located edit by edit and cannot be fixed")
        return self


class KNConfig(EditConfig):
    """KN, knowledge neurons (Dai et al. 2022), the baseline without training.

    threshold: share of an edit's largest score that a neuron must exceed
    """

    threshold: float = Field(0.2, gt=0, lt=1)
    frozen_layers: int = Field(0, ge=0)
    attribution: AttributionConfig = AttributionConfig(tokens="apart")


CONFIGS: dict[str, type[EditConfig]] = {
    "nse": NSEConfig,
    "memit": MEMITConfig,
    "alphaedit": AlphaEditConfig,
    "fine": FiNEConfig,
    "kne": KNEConfig,
    "kn": KNConfig,
}


def presets(method: str) -> list[str]:
    """Names of the presets that ship for `method`. Raises ValueError for an unknown method."""
    if method not in CONFIGS:
        raise ValueError(f"method must be one of {', '.join(sorted(CONFIGS))}, got {method!r}")
    folder = resources.files("fastedit") / "presets" / method
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_preset(method: str, name: str, **changes: Any) -> EditConfig:
    """The preset `name` of `method` with `changes` applied, see `changed`.

    Raises ValueError for an unknown method or preset (listing those that exist) or a value that does not fit."""
    if name not in presets(method):
        raise ValueError(f"{method}: no preset {name!r}; there are {', '.join(presets(method))}")
    return changed(CONFIGS[method].model_validate(_read(method, name)["config"]), changes)


def changed(config: AnyConfig, changes: Mapping[str, Any]) -> AnyConfig:
    """A copy of `config` with other values: {"rounds": 2, "value": {"steps": 10}} leaves the rest of `value` as it is.

    Raises ValueError naming a field that is unknown or a value that does not fit."""
    return type(config).model_validate(_merged(config.model_dump(), changes))


def parse_changes(assignments: Sequence[str]) -> dict[str, Any]:
    """["rounds=2", "value.steps=10"] as the changes that `changed` takes; values are read as YAML.

    Raises ValueError for an assignment without a name or an equals sign."""
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not all(name.split(".")):
            raise ValueError(f"a setting must look like rounds=2 or value.steps=10, got {assignment!r}")
        *path, last = name.split(".")
        place = changes
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"{part!r} is set twice, the second time by {assignment!r}")
        place[last] = yaml.safe_load(text)
    return changes


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(old)
    for name, value in new.items():
        part = both.get(name)
        both[name] = _merged(part, value) if isinstance(part, dict) and isinstance(value, Mapping) else value
    return both


def preset_for(method: str, n_layers: int, d_model: int, d_ff: int) -> EditConfig:
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
