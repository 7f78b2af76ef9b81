"""FiNE on SmolLM2-135M-Instruct beside the published procedure, edit by edit."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fastedit.editor import Editor
from fastedit.methods.columns.fine import FINE
from fastedit.model.load import ModelNotFound
from fastedit.model.tokens import whole_sequences
from fastedit.records.shipped import shipped_facts
from fastedit.weights.trial import Trial

# Neurons whose scores lie closer than this, relatively, may change places in float32.
TIE = 1e-4


@pytest.mark.slow
def test_neurons_losses_and_stop_are_those_of_the_published_procedure(published_fine: ModuleType) -> None:
    try:
        editor = Editor.from_pretrained("smollm2-135m", "fine", progress=False)
    except ModelNotFound as error:
        pytest.skip(str(error))
    edits, train = shipped_facts(4), editor.config.train
    model = editor.adapter
    sequences = whole_sequences(model.tokenizer, [e.prompt for e in edits], [e.target_new for e in edits])
    with Trial(editor.weights) as trial, torch.no_grad():
        result = FINE.write_batch(editor.stream.start, editor.state, edits, trial)
    settings = published_fine.FineSettings(k=editor.config.neurons, lr=train.lr, steps=train.steps)
    downs = [layer.mlp.down_proj for layer in model.layers]
    for edit, sequence in enumerate(sequences):
        prompt = sequence.ids[: -len(sequence.targets)]
        wanted = published_fine.edit_one(model.model.eval(), downs, prompt, sequence.targets, settings)
        here = result.slots.edits == edit
        torch.testing.assert_close(result.slots.scores[here], wanted.scores, rtol=TIE, atol=0)
        slots = zip(result.slots.layers[here].tolist(), result.slots.neurons[here].tolist(), strict=True)
        moved = [r for r, (ours, theirs) in enumerate(zip(slots, wanted.slots, strict=True)) if ours != theirs]
        for place in moved:
            others = torch.cat([wanted.scores[:place], wanted.scores[place + 1 :]])
            assert float(((others - wanted.scores[place]) / wanted.scores[place]).abs().min()) < TIE
        assert result.steps[edit] == wanted.steps
        curve = torch.tensor([loss for loss, _ in wanted.losses])
        torch.testing.assert_close(result.trained.curve[: len(curve), edit], curve, rtol=1e-3, atol=1e-4)
