"""FiNE, fine-grained neuron-level editing (ICLR 2025, arXiv 2503.01090): a few neurons per target token, located over
all layers but the last ones by what each adds to the token that the model says now, and one vector per neuron trained.

    W_l[:, i] += delta_r        for every chosen (l, i); see `locate.contributions` and `columns.train_columns`
Every edit of a batch is located and trained on the weights before the batch, and the vectors are summed, as in the
released code; batches of one are sequential editing. Nothing protects earlier edits, unless `protect` (ours) says so.
Differences from the released code, each on purpose: prompt and target are tokenised as one text; no end-of-text is put
before GPT-J's prompts, which its evaluation does not have either; the vectors and Adam are float32, not bf16; softmax
and drift are float32; an edit with a loss that is no number is refused, not written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.column_recipe import ColumnBatch, ColumnRecipe, ColumnResult, write_columns
from fastedit.columns import train_columns
from fastedit.config import FiNEConfig
from fastedit.locate import common_neurons, contributions, old_tokens
from fastedit.method import Start
from fastedit.stats import Source
from fastedit.tokens import whole_sequences


class FiNEState:
    """left_out: (n_layers, d_ff) bool, neurons that are not chosen, or None: common ones, found once, and those that
    committed batches wrote, with `protect`."""

    def __init__(self, start: Start) -> None:
        config: FiNEConfig = start.config
        self.protect = config.protect
        self.left_out = torch.zeros(start.model.n_layers, start.model.d_ff, dtype=torch.bool) if self.protect else None
        if config.common_share is not None:
            self.left_out = common(start, config, config.common_share)

    def snapshot(self) -> Tensor | None:
        """The neurons left out now."""
        return None if self.left_out is None else self.left_out.clone()

    def restore(self, snapshot: Tensor | None) -> None:
        """Leave out those of a snapshot."""
        self.left_out = snapshot

    def remember(self, result: ColumnResult) -> None:
        """What was written is left out from now on, with `protect`."""
        if self.protect and self.left_out is not None:
            self.left_out[result.slots.layers, result.slots.neurons] = True


def common(start: Start, config: FiNEConfig, share: float) -> Tensor:
    """The neurons that are common in the editor's text, or in what the unedited model writes; (n_layers, d_ff) bool."""
    model = start.model
    source = start.moments if isinstance(start.moments, Source) else Source(seed=start.seed)
    layers = range(model.n_layers - config.frozen_layers)
    with start.weights.rewound(), torch.no_grad():
        windows = source.windows(model, config.background, start.progress)
        with model.packed():
            gate_only = config.score_activation == "gate_only"
            return common_neurons(model, windows, config.neurons, layers, share, gate_only)


def fine(batch: ColumnBatch) -> ColumnResult:
    """Write one batch inside its trial."""
    config: FiNEConfig = batch.config
    model, gate_only = batch.model, config.score_activation == "gate_only"
    sequences = whole_sequences(model.tokenizer, batch.prompts, batch.targets)
    layers = range(model.n_layers - config.frozen_layers)
    tokens = old_tokens(model.tokenizer, batch.edits) if config.token == "old" else ()
    with model.packed():
        left_out = batch.state.left_out
        slots = contributions(model, sequences, config.neurons, layers, gate_only, tokens, excluded=left_out)
        trained = train_columns(model, sequences, slots, config.train, batch.progress)
    return write_columns(batch, slots, trained)


FINE = ColumnRecipe(fine, FiNEState)
