"""KNE and KN through the editor, on the tiny model that knows facts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastedit import EditSet, evaluate
from fastedit.config import changed
from fastedit.editor import Editor
from fastedit.methods.columns.attribution import attribute
from fastedit.methods.columns.ensemble import ensemble
from fastedit.model.tokens import whole_sequences
from fastedit.weights.trial import Trial


def changed_parameters(editor: Editor, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """name -> columns that differ."""
    state = editor.model.state_dict()
    return {
        name: (tensor != before[name]).any(0).nonzero().flatten()
        for name, tensor in state.items()
        if not torch.equal(tensor, before[name])
    }


def weights_of(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}


def test_the_ensemble_alone_is_trained_and_comes_back(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor("kne")
    before, batch = weights_of(editor), tiny_facts[:4]
    with torch.no_grad(), editor.adapter.packed():
        scores = attribute(editor.adapter, batch, editor.config.attribution).sum(0)
    members = ensemble(scores, editor.config.share)
    assert len(members) == round(editor.config.share * editor.adapter.n_layers * editor.adapter.d_ff)
    run = editor.edit(batch, batch_size=4)
    written = changed_parameters(editor, before)
    wanted = {editor.adapter.weight_name(layer): members[members[:, 0] == layer, 1] for layer in members[:, 0].tolist()}
    assert {name: index.tolist() for name, index in written.items()} == {n: i.tolist() for n, i in wanted.items()}
    assert evaluate(editor, run.edits, fluency_prompts=0).edited["efficacy_tokens"].value > 0.9
    editor.undo()
    assert changed_parameters(editor, before) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"ensemble": "union"},
        {"ensemble": "own"},
        {"fixed": True},
        {"alpha": 20.0, "alpha_per": "all"},
        {"attribution": {"path": "joint", "answer": "new", "nodes": 1}},
        {"attribution": {"answer": "greedy", "tokens": "apart", "everywhere": True}},
        {"key_layers": 2, "frozen_layers": 1, "train": {"kl_factor": 1.0}},
    ],
    ids=["union", "own", "fixed", "alpha", "joint", "greedy", "key_layers"],
)
def test_every_choice_edits(changes: dict[str, Any], tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor("kne", **changes)
    before = weights_of(editor)
    run = editor.edit(tiny_facts[:4], batch_size=2)
    assert all(report.loss is not None and report.steps for report in run.batches)
    efficacy = evaluate(editor, run.edits, fluency_prompts=0)
    assert efficacy.edited["efficacy_tokens"].value > efficacy.unedited["efficacy_tokens"].value
    layers = [editor.adapter.weight_name(layer) for layer in editor.weights.layers]
    assert set(changed_parameters(editor, before)) <= set(layers)
    if changes.get("fixed"):
        assert run.batches[0].neurons == run.batches[1].neurons
    editor.undo(2)
    assert changed_parameters(editor, before) == {}


def test_a_fixed_ensemble_is_forgotten_with_its_batch(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor("kne", fixed=True)
    editor.edit(tiny_facts[:2], 2)
    assert editor.state.slots is not None
    editor.undo()
    assert editor.state.slots is None


def test_an_ensemble_of_each_edit_cannot_be_fixed(tiny_editor: Callable[..., Editor]) -> None:
    config = tiny_editor("kne").config
    with pytest.raises(ValueError, match="cannot be fixed"):
        changed(config, {"fixed": True, "ensemble": "own"})


def test_kn_adds_the_embeddings_to_the_neurons_above_its_threshold(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet
) -> None:
    editor = tiny_editor("kn")
    edit, before = tiny_facts[0], weights_of(editor)
    with torch.no_grad(), editor.adapter.packed():
        (scores,) = attribute(editor.adapter, [edit], editor.config.attribution)
    wanted = (scores > editor.config.threshold * scores.max()).nonzero().tolist()
    assert editor.edit([edit]).batches[0].loss is None
    (sequence,) = whole_sequences(editor.tokenizer, [edit.prompt], [edit.target_new])
    written = changed_parameters(editor, before)
    assert sorted(
        [layer, int(column)]
        for layer in range(editor.adapter.n_layers)
        for column in written.get(editor.adapter.weight_name(layer), torch.empty(0))
    ) == sorted(wanted)
    layer, neuron = wanted[0]
    moved = editor.adapter.down_weight(layer)[:, neuron] - before[editor.adapter.weight_name(layer)][:, neuron]
    embedding = before[next(name for name in before if "embed_tokens" in name)]
    with torch.no_grad():
        logits = tiny_editor("kn").model(input_ids=torch.tensor([sequence.ids])).logits[0]
    said = logits[list(sequence.scored)].argmax(-1)
    factor = 2 if len(said) == 1 else 1
    expected = factor * (embedding[list(sequence.targets)].sum(0) - embedding[said].sum(0))
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)
    editor.undo()
    assert changed_parameters(editor, before) == {}


@pytest.mark.parametrize(("method", "settings"), [("kn", {}), ("kne", {}), ("kne", {"ensemble": "own"})])
def test_progress_moves_while_neurons_are_located_and_ends_at_the_number_of_edits(
    method: str, settings: dict[str, Any], tiny_editor: Callable[..., Editor], tiny_facts: EditSet
) -> None:
    editor = tiny_editor(method, **settings)
    told: list[float] = []
    with Trial(editor.weights) as trial:
        editor.method.write_batch(editor.stream.start, editor.state, tiny_facts[:3], trial, told.append)
    assert sum(told) == pytest.approx(3)
    assert len(told) >= editor.adapter.n_layers
    assert max(told) <= 1.5
