"""Settings of MeG, a part per stage."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FitConfig(_Settings):
    """Fitting one neuron per edit (see :mod:`fastedit.methods.meg.fit`).

    layer: the layer whose feed-forward gets the neuron; None = by depth, see `fit_layer`
    activation: of the neuron: "auto" as published, "identity", or "model" with a bias
    start: the shared start of all neurons: "drawn" as published, or "mean", whose a . z is about one wherever an
        answer begins, so that it answers every prompt alike
    template: around every prompt, `{}` is where it goes. Words after the prompt that are always the same make the
        places where answers begin alike, without which a neuron does not carry over to other wordings
    ending, stop_token: what the neuron teaches after the answer, so that the model stops: text, and the end token
    optimiser: plain gradient descent, in float32, with the rate lr ("descent", as published), or with the rate
        lr * loss / |gradient|^2 ("polyak"), which needs no tuning to the model and a fraction of the steps
    steps: steps at most
    stop_loss: an edit is done when every target token is the arg-max and its loss has fallen below
    token_budget: rows fitted together, which bounds memory
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


class EncoderConfig(_Settings):
    """The text encoder (see :mod:`fastedit.methods.meg.encoder`).

    source: "model" for the edited model itself, else a folder or hub id of a BERT-like encoder
    layer: with "model", the layer that learns; None = by depth
    pooling: with another encoder, "cls" or "mean"
    epochs, batch_size, lr, temperature: of the contrastive training, which goes through few pairs more often; 0 epochs
        leave the encoder as it is
    """

    source: str = "model"
    layer: int | None = Field(None, ge=1)
    pooling: Literal["cls", "mean"] = "mean"
    epochs: int = Field(3, ge=0)
    batch_size: int = Field(64, ge=2)
    lr: float = Field(5e-4, gt=0)
    temperature: float = Field(0.1, gt=0)


class FamiliarityConfig(_Settings):
    """The gate (see :mod:`fastedit.methods.meg.familiarity`).

    kind: "familiarity" as published, "cosine" to the nearest edit, or "none", every prompt edited
    threshold: of the entropy in nats, or of the cosine distance; None = chosen on the development slice, an entropy not
        below `sure`
    blocks, hidden_ratio, labels, dropout: of the network
    epochs, batch_size, lr, weight_decay, noise: of its training; noise: length of what is added to a unit vector
    background: weight of the loss that holds prompts of other facts to uniform
    learned, sure: training stops when this share of the edits has an entropy below half of `sure`, in nats
    """

    kind: Literal["familiarity", "cosine", "none"] = "familiarity"
    threshold: float | None = Field(None, ge=0)
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


class GeneratorConfig(_Settings):
    """The generator (see :mod:`fastedit.methods.meg.generator`).

    kind: "dit" as published, "mlp", or "lookup": the stored neuron of the nearest edit, no generator at all
    patch, width, blocks, heads, dropout: of the network
    predicts: what its training counts the error of: "velocity", as published, or "clean", the neuron itself
    epochs, batch_size, lr, weight_decay, ema: of its training
    noise: length of the Gaussian that is added to a unit vector; rewording: factor of the shift that is added too, one
        between two wordings of a fact of the development slice
    zero_ratio: how many unrelated prompts, per edit, are taught to give the zero neuron
    sampler_steps: of the deterministic sampler
    judge_every, good_enough: after so many epochs neurons drawn for shifted vectors are tried, and training stops at
        this share of success
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


class MegConfig(_Settings):
    """MeG, with a generator and a gate, or its look-up control; `CONFIGS` has both.

    max_others: of the records that are not edited, how many encoder and gate learn from
    max_new_tokens: of an answer that is measured, and of the locality answers it is compared with
    """

    fit: FitConfig = FitConfig()
    encoder: EncoderConfig = EncoderConfig()
    gate: FamiliarityConfig = FamiliarityConfig()
    generator: GeneratorConfig = GeneratorConfig()
    max_others: int = Field(2560, ge=0)
    max_new_tokens: int = Field(20, ge=1)


CONFIGS = {
    "meg": MegConfig(),
    "meg-lookup": MegConfig(gate=FamiliarityConfig(kind="cosine"), generator=GeneratorConfig(kind="lookup")),
}
