"""NSE against a plain transcription of its formulas, and what it may and may not touch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from fastedit.editor import Editor
from fastedit.methods.closed_form.values import optimise_values
from fastedit.records.edit import EditSet


def settings_of(published: ModuleType, editor: Editor) -> Any:
    config = editor.config
    return published.PublishedSettings(
        layers=config.layers,
        steps=config.value.steps,
        lr=config.value.lr,
        covariance_weight=config.covariance_weight,
        mass=config.mass,
        residual_min=config.residual_min,
        residual_max=config.residual_max,
        rounds=config.rounds,
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"mass": 0.8}, {"residual_min": 2.0, "rounds": 3}, {"layers": (2, 4), "rounds": 1}],
    ids=["all neurons", "selected neurons", "some edits skipped", "gap between layers"],
)
def test_updates_equal_the_transcription(
    changes: dict[str, Any], tiny_editor: Callable[..., Editor], tiny_facts: EditSet, published: ModuleType
) -> None:
    editor = tiny_editor(**changes)
    config, state = editor.config, editor.state
    twin = copy.deepcopy(editor.model)
    history = {layer: torch.zeros(editor.adapter.d_ff, editor.adapter.d_ff) for layer in config.layers}
    moments = {layer: state.moments[layer] for layer in config.layers}
    for start in (0, 6, 12):
        batch = tiny_facts[start : start + 6]
        with editor.weights.rewound():
            values = optimise_values(editor.adapter, batch, state.templates, config.layers[-1], config.value).z
        before = {layer: editor.weights.current(layer).clone() for layer in config.layers}
        editor.edit(batch)
        requests = [published.Request(e.prompt, e.subject_span[1], e.subject, e.target_new) for e in batch]
        totals = published.nse_batch(
            twin, editor.tokenizer, requests, values, state.templates, moments, history,
            settings_of(published, editor),
        )  # fmt: skip
        for layer in config.layers:
            ours = editor.weights.current(layer) - before[layer]
            assert float(totals[layer].norm()) > 0
            assert float((ours - totals[layer]).norm() / totals[layer].norm()) < 1e-4
            past = state.past[layer]
            gram = past.dense if past.rows is None else past.rows.T @ past.rows
            assert float((gram - history[layer]).norm() / history[layer].norm()) < 1e-4


def test_only_selected_columns_of_edited_layers_change(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor(mass=0.6, rounds=1)
    before = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    run = editor.edit(tiny_facts[:10])
    edited = {editor.adapter.weight_name(layer): layer for layer in editor.config.layers}
    for name, tensor in editor.model.state_dict().items():
        if name not in edited:
            assert torch.equal(tensor, before[name]), name
            continue
        moved = (tensor != before[name]).any(dim=0)
        assert 0 < int(moved.sum()) <= run.batches[0].neurons[edited[name]] < editor.adapter.d_ff


def test_released_choice_takes_one_neuron_less(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    batch = tiny_facts[:5]
    paper = tiny_editor(mass=0.5, rounds=1).edit(batch).batches[0].neurons
    released = tiny_editor(mass=0.5, rounds=1, as_released=True).edit(batch).batches[0].neurons
    first = min(paper)
    assert released[first] == paper[first] - 1


def test_edits_near_their_value_are_skipped_but_remembered(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet
) -> None:
    editor = tiny_editor(residual_min=1e6)
    fingerprint = editor.weights.fingerprint()
    run = editor.edit(tiny_facts[:4])
    assert run.batches[0].written == (0,)
    assert editor.weights.fingerprint() == fingerprint
    assert all(past.n_edits == 4 for past in editor.state.past.values())


def test_values_in_the_middle_of_a_stream_are_those_of_the_original_weights(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = tiny_editor()
    layer, batch = editor.config.layers[-1], tiny_facts[10:14]
    fresh = optimise_values(editor.adapter, batch, editor.state.templates, layer, editor.config.value)
    editor.edit(tiny_facts[:10])
    edited = optimise_values(editor.adapter, batch, editor.state.templates, layer, editor.config.value)
    with editor.weights.rewound():
        rewound = optimise_values(editor.adapter, batch, editor.state.templates, layer, editor.config.value)
    assert torch.equal(rewound.z, fresh.z)
    assert not torch.equal(edited.z, fresh.z)
