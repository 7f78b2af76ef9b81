"""KN, knowledge neurons (Dai et al. 2022): neurons by integrated gradients, rewritten without training.

    W_l[:, k] += sum_t e(y_t) - sum_t e(g_t)        for every neuron above threshold * the largest score
e the input embedding, y the target's tokens, g the model's own; both sums count twice for a target of one token, as in
the code that the comparisons with FiNE used. That code attributes the input of the activation function, takes one node
for Llama models (a gradient at zero) and the greedy tokens behind one another; here neurons are the down-projection's
inputs, as in the paper, with 20 nodes for every model, and the answer's own tokens go before the next one.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastedit.methods.base import NoState
from fastedit.methods.columns.attribution import attribute
from fastedit.methods.columns.config import KNConfig
from fastedit.methods.columns.contributions import Slots, observe
from fastedit.methods.columns.recipe import ColumnBatch, ColumnMethod, ColumnResult, write_columns
from fastedit.methods.columns.training import Trained
from fastedit.model.tokens import target_sequences


def kn(batch: ColumnBatch[KNConfig, NoState]) -> ColumnResult:
    """Write one batch inside its trial."""
    config = batch.config
    model = batch.model
    sequences = target_sequences(model.tokenizer, batch.prompts, batch.targets)
    with model.packed():
        scores = attribute(model, batch.edits, config.attribution, batch.stage(1, model.n_layers))
        scores = scores[:, : model.n_layers - config.frozen_layers]
        greedy = observe(model, sequences, ()).greedy
    edits, layers, neurons = (scores > config.threshold * scores.amax((1, 2), keepdim=True)).nonzero().unbind(1)
    slots = Slots(edits, layers, neurons, scores[edits, layers, neurons])
    counts = torch.tensor([len(s.targets) for s in sequences])
    owner = torch.arange(len(sequences)).repeat_interleave(counts)
    wanted = torch.tensor([token for s in sequences for token in s.targets])
    change = model.token_embedding(wanted) - model.token_embedding(greedy)
    like = change.to(torch.promote_types(model.dtype, torch.float32)).cpu()
    moved = like.new_zeros(len(sequences), model.d_model).index_add_(0, owner, like)
    moved = torch.where(counts[:, None] == 1, 2 * moved, moved)
    trained = Trained.start(0, len(sequences), 0, model.d_model, like)
    # Nothing is trained: there is no loss.
    trained.losses.fill_(torch.nan)
    return write_columns(batch, slots, trained.with_delta(moved[edits]))


KN = ColumnMethod(
    name="kn",
    config_class=KNConfig,
    presets=Path(__file__).parent / "presets" / "kn",
    recipe=kn,
    make_state=lambda start: NoState(),
    token_budget_setting=None,
)
