"""Settings of MeG, one class per stage."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from fastedit.config import Config

MethodName = Literal["meg", "meg-lookup"]


class FitConfig(Config):
    """Fitting one neuron per edit (see :mod:`fastedit.methods.meg.fit`).

    layer: the layer whose feed-forward gets the neuron; None = at three quarters of the depth, see `fit_layer`
    activation: of the neuron: "auto" as published, "identity", or "model", the model's own with a bias
    start: the shared start of all neurons: "drawn" as published, or "mean", for which a . z is about one wherever an
        answer begins, whatever the prompt
    template: the text around every prompt, with `{}` in the prompt's place. Fixed words after the prompt make the
        positions where answers begin alike; without them a neuron does not carry over to other wordings
    ending, stop_token: what the neuron has to produce after the answer, so that the model stops: a text, and whether
        the end token follows it
    optimiser: gradient descent in float32, with the step size lr ("descent", as published) or
        lr * loss / |gradient|^2 ("polyak"), which needs no tuning per model and far fewer steps
    steps: the largest number of steps
    stop_loss: fitting of an edit stops when every target token is the arg-max and the loss is below this, in nats
    token_budget: rows (tokens) fitted together; bounds memory
    """

    layer: int | None = Field(None, ge=0)
    activation: Literal["auto", "identity", "model"] = "auto"
    start: Literal["drawn", "mean"] = "mean"
    template: str = "{}\nAnswer:"
    ending: str = "."
    stop_token: bool = True
    optimiser: Literal["descent", "polyak"] = "polyak"
    steps: int = Field(100, ge=1)
    lr: float = Field(0.5, gt=0)
    stop_loss: float = Field(0.1, gt=0)
    token_budget: int = Field(1024, ge=1)

    @field_validator("template")
    @classmethod
    def _one_place(cls, template: str) -> str:
        if template.count("{}") != 1 or template != template.rstrip():
            raise ValueError(f"template must hold {{}} once and not end in a space or line break, got {template!r}")
        return template


def _as_text(source: Any) -> Any:
    """A path as text; all else as it is."""
    return os.fspath(source) if isinstance(source, os.PathLike) else source


class EncoderConfig(Config):
    """The text encoder (see :mod:`fastedit.methods.meg.encoder`).

    source: "model" for the edited model itself, otherwise a folder or hub id of a BERT-like encoder
    layer: with "model", the layer that is trained; None = at a fifth of the depth
    pooling: of a BERT-like encoder, "cls" or "mean"
    epochs, batch_size, lr, temperature: of the contrastive training; few pairs get more epochs than `epochs`, and
        epochs = 0 leaves the encoder untrained
    """

    source: Annotated[str, BeforeValidator(_as_text)] = "model"
    layer: int | None = Field(None, ge=1)
    pooling: Literal["cls", "mean"] = "mean"
    epochs: int = Field(3, ge=0)
    batch_size: int = Field(64, ge=2)
    lr: float = Field(5e-4, gt=0)
    temperature: float = Field(0.1, gt=0)


class FamiliarityConfig(Config):
    """The gate (see :mod:`fastedit.methods.meg.familiarity`).

    kind: "familiarity" as published, "cosine" for the distance to the nearest edit, or "none": every prompt is edited
    threshold: of the entropy in nats, or of the cosine distance; None = chosen on the development slice, for the
        entropy at least `sure`
    blocks, hidden_ratio, labels, dropout: of the network
    epochs, batch_size, lr, weight_decay: of its training
    noise: length of the Gaussian noise added to a unit vector in training
    background: weight of the loss that keeps the output uniform on prompts of other facts
    learned, sure: training stops when the share `learned` of the edits has an entropy below sure / 2, in nats
    """

    kind: Literal["familiarity", "cosine", "none"] = "familiarity"
    threshold: float | None = Field(None, ge=0, allow_inf_nan=True)
    blocks: int = Field(3, ge=1)
    hidden_ratio: int = Field(2, ge=1)
    labels: int = Field(10, ge=2)
    dropout: float = Field(0.1, ge=0, lt=1)
    epochs: int = Field(100, ge=1)
    batch_size: int = Field(256, ge=1)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    noise: float = Field(0.7, ge=0)
    background: float = Field(1.0, ge=0)
    learned: float = Field(0.99, gt=0, le=1)
    sure: float = Field(0.3, gt=0)


class GeneratorConfig(Config):
    """The generator (see :mod:`fastedit.methods.meg.generator`).

    kind: "dit" as published, "mlp", or "lookup": no generator, the stored neuron of the nearest edit is used
    patch, width, blocks, heads, dropout: of the network
    predicts: what the training loss compares: "velocity", as published, or "clean", the neuron itself
    epochs, batch_size, lr, weight_decay, ema: of its training
    noise: length of the Gaussian noise added to a unit vector in training
    rewording: factor of the shift that is added as well, a difference between two wordings of one fact of the
        development slice
    zero_ratio: unrelated prompts per edit whose target is the zero neuron
    sampler_steps: steps of the deterministic sampler
    judge_every, good_enough: every `judge_every` epochs neurons are drawn for shifted vectors and tried; training stops
        when the share `good_enough` of them gives the answer
    """

    kind: Literal["dit", "mlp", "lookup"] = "dit"
    patch: int = Field(288, ge=1)
    width: int = Field(384, ge=8)
    blocks: int = Field(2, ge=1)
    heads: int = Field(6, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    predicts: Literal["velocity", "clean"] = "clean"
    epochs: int = Field(300, ge=1)
    batch_size: int = Field(128, ge=1)
    lr: float = Field(1.5e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    ema: float = Field(0.99, ge=0, lt=1)
    noise: float = Field(0.5, ge=0)
    rewording: float = Field(1.0, ge=0)
    zero_ratio: float = Field(0.0, ge=0)
    sampler_steps: int = Field(50, ge=1, le=1000)
    judge_every: int = Field(20, ge=1)
    good_enough: float = Field(0.97, gt=0, le=1)


class MegConfig(Config):
    """MeG with a generator and a gate, or its look-up control; `CONFIGS` has both.

    max_others: the largest number of records that are not edited from which encoder and gate learn
    max_new_tokens: length of measured answers, and of the base model's answers they are compared with, in tokens
    """

    fit: FitConfig = FitConfig()
    encoder: EncoderConfig = EncoderConfig()
    gate: FamiliarityConfig = FamiliarityConfig()
    generator: GeneratorConfig = GeneratorConfig()
    max_others: int = Field(2560, ge=0)
    max_new_tokens: int = Field(20, ge=1)


CONFIGS: dict[MethodName, MegConfig] = {
    "meg": MegConfig(),
    "meg-lookup": MegConfig(gate=FamiliarityConfig(kind="cosine"), generator=GeneratorConfig(kind="lookup")),
}


def method_name(name: str) -> MethodName:
    """The name as a type. Raises ValueError for any other name."""
    for known in CONFIGS:
        if known == name:
            return known
    raise ValueError(f"method must be one of {', '.join(CONFIGS)}, got {name!r}")


def method_of(config: MegConfig) -> MethodName:
    """The name of the method that a config belongs to: "meg-lookup" without a generator, else "meg"."""
    return "meg-lookup" if config.generator.kind == "lookup" else "meg"
