"""FiNE, fine-grained neuron-level editing (ICLR 2025, arXiv 2503.01090): a few neurons per target token, located over
all layers but the last ones by what each adds to the token that the model says now, and one vector per neuron trained.

    W_l[:, i] += delta_r        for every chosen (l, i); see `locate.contributions` and `columns.train_columns`
Every edit of a batch is located and trained on the weights before the batch, and the vectors are summed, as in the
released code; batches of one are sequential editing. Nothing protects earlier edits.
Differences from the released code, each on purpose: prompt and target are tokenised as one text; no end-of-text is put
before GPT-J's prompts, which its evaluation does not have either; the vectors and Adam are float32, not bf16; softmax
and drift are float32; an edit with a loss that is no number is refused, not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastedit.column_recipe import ColumnBatch, ColumnRecipe, ColumnResult, NoState, write_columns
from fastedit.columns import train_columns
from fastedit.config import FiNEConfig
from fastedit.locate import common_neurons, contributions, old_tokens
from fastedit.method import Start
from fastedit.runlog import tensors_hash
from fastedit.stats import Source
from fastedit.tokens import whole_sequences


class FiNEState(NoState):
    """What is found once per editor. common: (n_layers, d_ff) bool, neurons left out, or None."""

    def __init__(self, start: Start) -> None:
        config: FiNEConfig = start.config
        self.common: Tensor | None = None
        if config.common_share is None:
            return
        model = start.model
        source = start.moments if isinstance(start.moments, Source) else Source(seed=start.seed)
        layers = range(model.n_layers - config.frozen_layers)
        gate_only = config.score_activation == "gate_only"
        with start.weights.rewound(), torch.no_grad():
            windows = source.windows(model, config.background, start.progress)
            with model.packed():
                self.common = common_neurons(model, windows, config.neurons, layers, config.common_share, gate_only)

    def describe(self) -> dict[str, Any]:
        """The SHA-256 of the neurons left out, or None."""
        return {"common": None if self.common is None else tensors_hash({"common": self.common})}

    def adopt(self, described: Mapping[str, Any]) -> None:
        """Raises ValueError where other neurons are left out."""
        if self.describe() != described:
            raise ValueError("the neurons common in the background text are not those that the run began with")


def fine(batch: ColumnBatch) -> ColumnResult:
    """Write one batch inside its trial."""
    config: FiNEConfig = batch.config
    model, gate_only = batch.model, config.score_activation == "gate_only"
    sequences = whole_sequences(model.tokenizer, batch.prompts, batch.targets)
    layers = range(model.n_layers - config.frozen_layers)
    tokens = old_tokens(model.tokenizer, batch.edits) if config.token == "old" else ()
    with model.packed():
        slots = contributions(model, sequences, config.neurons, layers, gate_only, tokens, excluded=batch.state.common)
        trained = train_columns(model, sequences, slots, config.train, batch.progress)
    return write_columns(batch, slots, trained)


FINE = ColumnRecipe(fine, FiNEState)
