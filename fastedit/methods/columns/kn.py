"""KN, knowledge neurons (Dai et al. 2022): neurons by integrated gradients, rewritten without training.

    W_l[:, k] += sum_t e(y_t) - sum_t e(g_t)        for every neuron above threshold * the largest score
e is the input embedding, y the target's tokens, g the model's greedy ones. Both sums count twice for a target of one
token, as in the code that the comparisons with FiNE used. That code differs in three ways: it attributes the input of
the activation function; it takes one node for Llama models, a gradient at zero; and it predicts each greedy token after
the greedy ones before it. Here neurons are the inputs of the down-projection, as in the paper, with 20 nodes for every
model, and each token is predicted after the answer's own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastedit.methods.base import NoState
from fastedit.methods.columns.attribution import attribute
from fastedit.methods.columns.config import KNConfig
from fastedit.methods.columns.contributions import Slots, observe
from fastedit.methods.columns.derived import kn_settings
from fastedit.methods.columns.recipe import ColumnBatch, ColumnMethod, ColumnResult, write_columns
from fastedit.methods.columns.training import Trained
from fastedit.model.adapter import ModelAdapter
from fastedit.model.tokens import TokenSequence, target_sequences


def kn(batch: ColumnBatch[KNConfig, NoState]) -> ColumnResult:
    """Write one batch inside its trial."""
    config = batch.config
    model = batch.model
    sequences = target_sequences(model.tokenizer, batch.prompts, batch.targets, batch.joins)

    with model.packed():
        scores = attribute(model, batch.edits, config.attribution, batch.stage(1, model.n_layers))
        scores = scores[:, : model.n_layers - config.frozen_layers]
        greedy = observe(model, sequences, ()).greedy

    slots = _slots_above(scores, config.threshold)
    change = _embedding_change(model, sequences, greedy)

    unchanged = Trained.start(0, len(sequences), 0, model.d_model, change)
    # Nothing is trained, so there is no loss.
    unchanged.losses.fill_(torch.nan)
    return write_columns(batch, slots, unchanged.with_delta(change[slots.edits]))


def _slots_above(scores: Tensor, threshold: float) -> Slots:
    """The slots of every edit above `threshold` times its largest score. scores: (n_edits, n_layers, d_ff)"""
    above = scores > threshold * scores.amax((1, 2), keepdim=True)
    edits, layers, neurons = above.nonzero().unbind(1)
    return Slots(edits, layers, neurons, scores[edits, layers, neurons])


def _embedding_change(model: ModelAdapter, sequences: Sequence[TokenSequence], greedy: Tensor) -> Tensor:
    """sum_t e(y_t) - sum_t e(g_t) of each edit, (n_edits, d_model) float32 or float64 on the CPU.

    greedy: (number of target tokens,) int64, the model's own tokens in their places"""
    counts = torch.tensor([len(sequence.targets) for sequence in sequences])
    edit_of_token = torch.arange(len(sequences)).repeat_interleave(counts)
    targets = torch.tensor([token for sequence in sequences for token in sequence.targets])

    change = model.token_embedding(targets) - model.token_embedding(greedy)
    change = change.to(torch.promote_types(model.dtype, torch.float32)).cpu()
    summed = change.new_zeros(len(sequences), model.d_model).index_add_(0, edit_of_token, change)
    return torch.where(counts[:, None] == 1, 2 * summed, summed)


KN = ColumnMethod(
    name="kn",
    config_class=KNConfig,
    presets=Path(__file__).parent / "presets" / "kn",
    derive=kn_settings,
    # Without training most of its edits fail, as published.
    is_checked=False,
    recipe=kn,
    make_state=lambda start: NoState(),
    token_budget_setting=None,
)
