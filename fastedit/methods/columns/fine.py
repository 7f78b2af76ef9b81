"""FiNE, fine-grained neuron-level editing (ICLR 2025, arXiv 2503.01090): a few neurons per target token, chosen in all
layers but the last ones by their contribution to the logit of the model's own token, and one trained vector per neuron.

    W_l[:, i] += delta_r        for every chosen (l, i); see `contributions.choose_slots` and `training.train_columns`
Every edit of a batch is located and trained on the weights before the batch, and the vectors are summed, as in the
released code; batches of one are sequential editing. Nothing protects earlier edits, except with `protect` (ours).
Deliberate differences from the released code: prompt and target are tokenised as one text; no end-of-text token stands
before GPT-J's prompts, as in its evaluation; the vectors and Adam are float32, not bfloat16; softmax and drift are
float32; an edit whose loss is not finite is refused.
"""

from __future__ import annotations

from pathlib import Path

from fastedit.methods.columns.config import FiNEConfig
from fastedit.methods.columns.contributions import choose_slots, old_tokens
from fastedit.methods.columns.derived import RATE_SWEEP, fine_settings
from fastedit.methods.columns.recipe import ColumnBatch, ColumnMethod, ColumnResult, write_columns
from fastedit.methods.columns.state import LeftOut
from fastedit.methods.columns.training import train_columns
from fastedit.model.tokens import whole_sequences


def fine(batch: ColumnBatch[FiNEConfig, LeftOut]) -> ColumnResult:
    """Write one batch inside its trial."""
    config = batch.config
    model = batch.model
    sequences = whole_sequences(model.tokenizer, batch.prompts, batch.targets, batch.joins)
    layers = range(model.n_layers - config.frozen_layers)
    gate_only = config.score_activation == "gate_only"
    tokens = old_tokens(model.tokenizer, batch.edits) if config.token == "old" else ()
    excluded = batch.state.left_out

    with model.packed():
        slots = choose_slots(model, sequences, config.neurons, layers, gate_only, tokens, excluded=excluded)
        trained = train_columns(model, sequences, slots, config.train, batch.progress)

    return write_columns(batch, slots, trained)


FINE = ColumnMethod(
    name="fine",
    config_class=FiNEConfig,
    presets=Path(__file__).parent / "presets" / "fine",
    derive=fine_settings,
    sweep=RATE_SWEEP,
    recipe=fine,
    make_state=LeftOut,
    text_setting="background",
    needs_text=lambda config: config.common_share is not None,
)
