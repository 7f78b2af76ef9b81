"""Settings of the closed-form methods for a model without a preset, in units that carry over from model to model.

| setting | unit | where the factor comes from |
| --- | --- | --- |
| layers | share of the depth | the released 4-8 of 32 (Llama 3), 3-8 of 28 (GPT-J), and 4-8 of 30 swept on SmolLM2 |
| lambda | d_ff | 15 000 released for 14 336 and 16 384, 1 500 swept for 1 536: k^T C^-1 k grows with d_ff |
| learning rate | rms of an element of the unedited value | 0.5 swept on SmolLM2, where it is 6.1 |
| weight decay | norm of the unedited value, by whose square the published loss divides | 0.5 released, swept at 147 |
| bounds of the residual | norm of the unedited value | 15 and 150 swept on SmolLM2, where it is 147 |
| null-space threshold | mean eigenvalue of C | 0.02 released; on SmolLM2 that is 0.7 to 1.3 |
| ridge of the null space | trace of C | 10 released; on SmolLM2 that is 0.2 to 0.4 |

The clamp is relative as published. The unedited value is measured at the lookup tokens of the
facts that ship with fastedit, in one forward up to the value layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fastedit.config import layer_list
from fastedit.methods.base import CannotDerive, Sweep
from fastedit.methods.closed_form.config import ClosedFormConfig
from fastedit.methods.closed_form.keys import KeySweep
from fastedit.model.adapter import ModelAdapter
from fastedit.records.shipped import usable_facts
from fastedit.runtime.words import two_digits

# Share of the layers up to the value layer, and how many layers are edited.
DEPTH = 5 / 16
N_LAYERS = 5
LR = 0.08
WEIGHT_DECAY = 0.0034
RESIDUAL_MIN, RESIDUAL_MAX = 0.1, 1.0
NULL_THRESHOLD = 1.0
RIDGE = 0.3
# A post-norm value is a direction: the norm takes its length, so it may grow. Chosen on Gemma 3 270M, records 500-549.
POST_NORM_LAYERS = 3
POST_NORM_LR = 0.19
POST_NORM_CLAMP = 4.0
POST_NORM_STEPS = 25
POST_NORM_ROUNDS = 2
# Background tokens per neuron, within these bounds.
TOKENS_PER_NEURON = 10
TOKENS_MIN, TOKENS_MAX = 30_000, 100_000
MEASURED_FACTS = 30
# Depths of the value layer that a sweep tries.
SWEPT = (0.1, 0.2, 0.35, 0.5, 0.65)


class Unedited(NamedTuple):
    """What is measured at the value layer of the unedited model.

    layers: the edited layers, the last of them the value layer
    norm: median norm of the value over the shipped facts
    rms: of an element of the value, norm / sqrt(d_model)
    """

    layers: tuple[int, ...]
    norm: float
    rms: float


def nse_settings(model: ModelAdapter, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `NSEConfig`. changes: what the caller sets. Raises CannotDerive."""
    unedited = measure(model, changes)
    bounds = {"residual_min": two_digits(RESIDUAL_MIN * unedited.norm)}
    if not model.post_norm:
        bounds["residual_max"] = two_digits(RESIDUAL_MAX * unedited.norm)

    rounds = POST_NORM_ROUNDS if model.post_norm else 1
    return {**memit_settings(model, changes, unedited), "mass": 0.95, "rounds": rounds, **bounds}


def memit_settings(model: ModelAdapter, changes: Mapping[str, Any], unedited: Unedited | None = None) -> dict[str, Any]:
    """Fields of `MEMITConfig`. changes: what the caller sets. Raises CannotDerive."""
    shared = _shared(model, unedited or measure(model, changes))
    return {**shared, "covariance_weight": two_digits(model.d_ff)}


def alphaedit_settings(model: ModelAdapter, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `AlphaEditConfig`. changes: what the caller sets. Raises CannotDerive."""
    null_space = {"units": "trace", "null_threshold": NULL_THRESHOLD, "ridge": RIDGE}
    # What is set by the names that the paper gives is meant in its units.
    if not {"units", "null_threshold", "ridge"}.isdisjoint(changes):
        null_space = {}

    return {**_shared(model, measure(model, changes)), **null_space}


def edited_layers(model: ModelAdapter) -> tuple[int, ...]:
    """The layers up to the value layer. Raises CannotDerive for a model with a single layer."""
    if model.n_layers < 2:
        raise CannotDerive("a closed form edits layers below the last one, and the model has one layer")

    value_layer = min(max(int(DEPTH * model.n_layers + 0.5) - 1, 0), model.n_layers - 2)
    count = (POST_NORM_LAYERS if model.shares_a_value else 1) if model.post_norm else N_LAYERS
    return tuple(range(max(0, value_layer - count + 1), value_layer + 1))


def _windows(model: ModelAdapter, config: ClosedFormConfig) -> list[tuple[int, ...]]:
    """As many layers as in the settings, at depths from a tenth to two thirds."""
    last = sorted({min(int(share * model.n_layers), model.n_layers - 2) for share in SWEPT})
    return [tuple(range(max(0, layer - len(config.layers) + 1), layer + 1)) for layer in last if layer >= 0]


LAYER_SWEEP = Sweep("layers", _windows)


def measure(model: ModelAdapter, changes: Mapping[str, Any]) -> Unedited:
    """Measure the unedited value. changes: its `layers` count, where they are set

    Raises CannotDerive for a model that takes none of the shipped facts."""
    layers = tuple(layer_list(changes.get("layers", edited_layers(model))))
    # Layers that the model does not have are refused where the settings are judged.
    layer = min(layers[-1], model.n_layers - 2)

    facts = usable_facts(
        MEASURED_FACTS,
        tokenizer=model.tokenizer,
        max_positions=model.max_positions,
        n_embeddings=model.n_embeddings,
    )
    if not facts:
        raise CannotDerive("it takes none of the facts by which it would be measured")

    with torch.no_grad(), model.packed():
        (captured,) = KeySweep(model, facts, ("{}",), (layer,))
        norm = float(captured.hidden.float().norm(dim=1).median())

    return Unedited(layers, norm, norm / model.d_model**0.5)


def _shared(model: ModelAdapter, unedited: Unedited) -> dict[str, Any]:
    """The fields that all closed forms have."""
    decay = two_digits(WEIGHT_DECAY * unedited.norm)
    value: dict[str, Any] = {
        "steps": 20,
        "lr": two_digits(LR * unedited.rms),
        "weight_decay": decay,
        "stop_after_top1": 5,
    }
    if model.post_norm:
        lr = two_digits(POST_NORM_LR * unedited.rms)
        value |= {"steps": POST_NORM_STEPS, "lr": lr, "clamp": POST_NORM_CLAMP}

    tokens = min(max(TOKENS_PER_NEURON * model.d_ff, TOKENS_MIN), TOKENS_MAX)
    return {"layers": list(unedited.layers), "value": value, "moments": {"tokens": tokens}}
