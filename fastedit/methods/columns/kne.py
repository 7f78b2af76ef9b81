"""KNE, knowledge neuronal ensemble (arXiv 2412.20637): the neurons of all layers whose integrated gradient lies above
one threshold are trained together, and nothing else.

    Attr(l, k)  integrated gradient of the answer's probabilities        published; see `attribution`
    ensemble    every neuron above the (1 - p) quantile over all layers  published
    W_l[:, k] += alpha / sqrt(n) dW_l[:, k]                               published
No code of it is public and its paper leaves much open: `KNEConfig` says what is published and what is our reading.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastedit.methods.columns.attribution import attribute
from fastedit.methods.columns.config import KNEConfig
from fastedit.methods.columns.contributions import Slots
from fastedit.methods.columns.derived import RATE_SWEEP, kne_settings
from fastedit.methods.columns.ensemble import ensemble
from fastedit.methods.columns.recipe import ColumnBatch, ColumnMethod, ColumnResult, write_columns
from fastedit.methods.columns.state import FirstSlots
from fastedit.methods.columns.training import train_columns, train_shared
from fastedit.model.tokens import whole_sequences


def kne(batch: ColumnBatch[KNEConfig, FirstSlots]) -> ColumnResult:
    """Write one batch inside its trial."""
    config = batch.config
    model = batch.model
    sequences = whole_sequences(model.tokenizer, batch.prompts, batch.targets, batch.joins)

    with model.packed():
        slots = batch.state.slots if config.fixed else None
        # Share of the batch's work: choosing the ensemble takes about as long as training it.
        choosing = 0.5 if slots is None else 0.0
        if slots is None:
            scores = attribute(model, batch.edits, config.attribution, batch.stage(choosing, model.n_layers))
            slots = choose_ensemble(scores, config)

        train = train_columns if config.ensemble == "own" else train_shared
        trained = train(model, sequences, slots, config.train, batch.stage(1 - choosing, len(sequences)))

    return write_columns(batch, slots, trained)


def choose_ensemble(scores: Tensor, config: KNEConfig) -> Slots:
    """The slots of a batch. scores: (n_edits, n_layers, d_ff); with "shared" and "union" all slots belong to edit 0."""
    scores = scores[:, : scores.shape[1] - config.frozen_layers]
    summed = scores.sum(0)
    tables = [summed] if config.ensemble == "shared" else list(scores)
    ensembles = [ensemble(table, config.share, config.key_layers) for table in tables]
    if config.ensemble == "union":
        tables = [summed]
        ensembles = [torch.unique(torch.cat(ensembles), dim=0)]

    parts = []
    for edit, (table, members) in enumerate(zip(tables, ensembles, strict=True)):
        layers, neurons = members.unbind(1)
        scales = _scales(layers, config)
        parts.append(Slots(torch.full_like(layers, edit), layers, neurons, table[layers, neurons], scales))
    return Slots.joined(parts)


def _scales(layers: Tensor, config: KNEConfig) -> Tensor | None:
    """alpha / sqrt(n) of every member, n the members of its layer or of all layers; None = 1. layers: (n_members,)"""
    if config.alpha is None:
        return None

    n = torch.bincount(layers)[layers] if config.alpha_per == "layer" else torch.full_like(layers, len(layers))
    return config.alpha / n.sqrt()


KNE = ColumnMethod(
    name="kne",
    config_class=KNEConfig,
    presets=Path(__file__).parent / "presets" / "kne",
    derive=kne_settings,
    sweep=RATE_SWEEP,
    recipe=kne,
    make_state=lambda start: FirstSlots(),
)
