"""Settings of the methods that write single columns."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fastedit.config import Config, EditConfig, Layers, MomentConfig


class TrainConfig(Config):
    """Training of chosen columns (see :mod:`fastedit.methods.columns.training`).

    steps: upper bound on Adam steps
    stop_probability: an edit is finished when every target token has a larger probability
    reduce: how the losses of the target's tokens combine: the "worst" of them, or their "mean"
    kl_factor: weight of the drift KL(p_0 || p), averaged over the prompt's positions except the last
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


class ColumnConfig(EditConfig):
    """What every method that writes single columns needs.

    frozen_layers: the last layers, in which no neuron is chosen
    """

    frozen_layers: int = Field(0, ge=0)


class FiNEConfig(ColumnConfig):
    """FiNE, fine-grained neuron-level editing (ICLR 2025, arXiv 2503.01090, and its released code).

    neurons: k, neurons chosen for each target token
    frozen_layers: the last layers, in which no neuron is chosen
    score_activation: "down_in", the down-projection's input; "gate_only", the activation without the up projection, as
        the release scored Llama models until May 2025, probably for the paper's numbers
    token: the token whose logit a neuron is scored by. "greedy" (published): the model's arg-max at that position;
        "old" (ours): at the first target token, the first token of `target_true` where the record has one
    common_share: ours: exclude neurons that would be chosen at more than this share of the positions of background
        text, because they promote frequent tokens everywhere; None (published) = exclude none
    background: length of that text; its source is the editor's `moments`, by default text sampled from the model
    protect: ours, for streams: a column that an earlier batch wrote is not chosen again. As published, nothing protects
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


class AttributionConfig(Config):
    """Integrated gradients of neurons (see :mod:`fastedit.methods.columns.attribution`).

    nodes: M of the midpoint rule
    path, tokens, everywhere: see `integrated_gradients`; KN publishes "layer"
    answer: the answer whose probability is attributed. "old": `target_true`, or the model's greedy tokens where the
        record has none; "greedy": always the greedy tokens; "new": the target
    """

    nodes: int = Field(20, ge=1)
    path: Literal["layer", "joint"] = "layer"
    tokens: Literal["together", "apart"] = "together"
    everywhere: bool = False
    answer: Literal["old", "greedy", "new"] = "old"


class KNEConfig(ColumnConfig):
    """KNE, knowledge neuronal ensemble (arXiv 2412.20637).

    Published: integrated gradients summed over the answer's tokens, one quantile of the scores of all layers,
    W + alpha / sqrt(n) dW, training of the ensemble alone. The paper leaves the rest open; it is our reading.

    share: p, share of all neurons in the ensemble
    key_layers: K: choose again inside the K layers with most members; or the layers themselves; None = all layers
    alpha: None = sqrt(n), which adds the trained change unscaled
    alpha_per: whether n counts the members of the "layer" or of "all" layers
    ensemble: "shared": one ensemble per batch, by the summed scores, trained on the mean loss; "union": the union of
        the edits' ensembles, trained on the mean loss; "own": each edit trains its own, and the changes are summed
    fixed: keep the first batch's ensemble for the whole stream; not with "own"
    train: the loss is the mean over the target's tokens; `kl_factor` adds FiNE's drift
    """

    share: float = Field(0.01, gt=0, lt=1)
    key_layers: int | Layers | None = None
    alpha: float | None = Field(None, gt=0)
    alpha_per: Literal["layer", "all"] = "layer"
    ensemble: Literal["shared", "union", "own"] = "shared"
    fixed: bool = False
    attribution: AttributionConfig = AttributionConfig()
    train: TrainConfig = TrainConfig(steps=25, lr=1e-3, reduce="mean", kl_factor=0, repetition_factor=0, norm_factor=0)

    @model_validator(mode="after")
    def _one_ensemble(self) -> KNEConfig:
        if self.fixed and self.ensemble == "own":
            raise ValueError("ensemble 'own' is located edit by edit and cannot be fixed")
        return self


class KNConfig(ColumnConfig):
    """KN, knowledge neurons (Dai et al. 2022), the baseline without training.

    threshold: share of an edit's largest score that a neuron must exceed
    """

    threshold: float = Field(0.2, gt=0, lt=1)
    attribution: AttributionConfig = AttributionConfig(tokens="apart")
