"""MEMIT and AlphaEdit against plain transcriptions of their formulas; what memory of past edits does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from fastedit.editor import Editor
from fastedit.methods.closed_form.values import Values, optimise_values
from fastedit.methods.presets import presets
from fastedit.methods.registry import METHODS
from fastedit.records.edit import EditSet


def requests_of(published: ModuleType, batch: EditSet) -> list[Any]:
    return [published.Request(e.prompt, e.subject_span[1], e.subject, e.target_new) for e in batch]


def present_values(editor: Editor, batch: EditSet) -> torch.Tensor:
    config = editor.config
    return optimise_values(editor.adapter, batch, editor.state.templates, config.layers[-1], config.value).z


def assert_same_stream(
    editor: Editor, facts: EditSet, published: ModuleType, write: Callable[[list[Any], torch.Tensor], Any]
) -> None:
    """Three batches of six: the editor's updates are those that `write` makes on a twin of the model."""
    for start in (0, 6, 12):
        batch = facts[start : start + 6]
        values = present_values(editor, batch)
        before = {layer: editor.weights.current(layer).clone() for layer in editor.config.layers}
        editor.edit(batch)
        totals = write(requests_of(published, batch), values)
        for layer, total in totals.items():
            ours = editor.weights.current(layer) - before[layer]
            assert float(total.norm()) > 0
            assert float((ours - total).norm() / total.norm()) < 1e-4, (start, layer)


@pytest.mark.parametrize("memory", [False, True])
def test_memit_equals_the_transcription(
    memory: bool,
    tiny_editor: Callable[..., Editor],
    tiny_facts: EditSet,
    published: ModuleType,
    published_siblings: ModuleType,
) -> None:
    editor = tiny_editor("memit", memory=memory)
    config, state, width = editor.config, editor.state, editor.adapter.d_ff
    twin, tokenizer = copy.deepcopy(editor.model), editor.tokenizer
    history = {layer: torch.zeros(width, width) for layer in config.layers} if memory else None
    settings = published.PublishedSettings(
        config.layers, config.value.steps, config.value.lr, config.covariance_weight, 1.0, 0.0, float("inf"), 1
    )

    def write(requests: list[Any], values: torch.Tensor) -> dict[int, torch.Tensor]:
        return published_siblings.memit_batch(
            twin, tokenizer, requests, values, state.templates, state.moments, settings, history
        )

    assert_same_stream(editor, tiny_facts, published, write)
    assert {past.n_edits for past in state.past.values()} == {18 if memory else 0}


@pytest.mark.parametrize("threshold", [0.02, 0.005])
def test_alphaedit_equals_the_transcription(
    threshold: float,
    tiny_editor: Callable[..., Editor],
    tiny_facts: EditSet,
    published: ModuleType,
    published_siblings: ModuleType,
) -> None:
    editor = tiny_editor("alphaedit", null_threshold=threshold)
    config, state, width = editor.config, editor.state, editor.adapter.d_ff
    twin, tokenizer = copy.deepcopy(editor.model), editor.tokenizer
    history = {layer: torch.zeros(width, width) for layer in config.layers}
    projectors = {layer: published_siblings.projector(state.moments[layer], threshold) for layer in config.layers}

    def write(requests: list[Any], values: torch.Tensor) -> dict[int, torch.Tensor]:
        return published_siblings.alphaedit_batch(
            twin, tokenizer, requests, values, state.templates, projectors, history, config.layers, config.ridge
        )

    assert_same_stream(editor, tiny_facts, published, write)


def test_alphaedit_stays_in_the_null_space(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    """What lies outside of it is the share of the update that acts on strong background directions."""
    outside = {}
    for method in ("alphaedit", "memit"):
        editor = tiny_editor(method)
        layer = editor.config.layers[-1]
        before = editor.weights.current(layer).clone()
        editor.edit(tiny_facts[:10])
        delta = (editor.weights.current(layer) - before).double()
        values, vectors = torch.linalg.eigh(editor.state.moments[layer].double())
        outside[method] = float((delta @ vectors[:, values >= 0.02]).norm() / delta.norm())
    assert outside["alphaedit"] < 1e-5
    assert outside["memit"] > 1e-2


@pytest.mark.parametrize(("method", "changes"), [("memit", {}), ("memit", {"memory": True}), ("alphaedit", {})])
def test_edits_take_and_are_undone_bit_for_bit(
    method: str, changes: dict[str, Any], tiny_editor: Callable[..., Editor], tiny_facts: EditSet
) -> None:
    editor = tiny_editor(method, **changes)
    state = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    edited = {editor.adapter.weight_name(layer) for layer in editor.config.layers}
    batch = tiny_facts[:8]
    prompts = [edit.prompt for edit in batch]
    before = editor.ask(prompts, n_tokens=1)
    editor.edit(batch, batch_size=4)
    after = editor.ask(prompts, n_tokens=1)
    taken = [a.strip() and e.target_new.startswith(a.strip()) for a, e in zip(after, batch, strict=True)]
    assert sum(map(bool, taken)) >= 7
    assert before != after
    for name, tensor in editor.model.state_dict().items():
        assert torch.equal(tensor, state[name]) == (name not in edited), name
    editor.undo(last=2)
    assert all(torch.equal(tensor, state[name]) for name, tensor in editor.model.state_dict().items())


def test_values_are_optimised_on_the_present_weights(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = tiny_editor("memit")
    editor.edit(tiny_facts[:6])
    seen: list[Values] = []

    def spy(*args: Any, **kwargs: Any) -> Values:
        seen.append(optimise_values(*args, **kwargs))
        return seen[-1]

    wanted = present_values(editor, tiny_facts[6:10])
    monkeypatch.setattr("fastedit.methods.closed_form.recipe.optimise_values", spy)
    editor.edit(tiny_facts[6:10])
    assert torch.equal(seen[0].z, wanted)


def test_every_method_has_its_name_and_a_preset_for_the_default_model() -> None:
    assert all(method.name == name for name, method in METHODS.items())
    assert all("smollm2-135m" in presets(method) for method in METHODS)
