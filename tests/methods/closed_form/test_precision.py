"""Half precision: values with upper layers in bf16, models in bf16 and fp16, masters that keep small updates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastedit.editor import Editor
from fastedit.evaluation.metrics import evaluate
from fastedit.methods.closed_form.config import ValueConfig
from fastedit.methods.closed_form.values import optimise_values, upper_layers
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import EditSet
from fastedit.weights.editable import EditableWeights


def test_values_in_bf16_pass_the_parity_gate(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    """Loss and steps, not coordinates: Adam's first step is a sign step."""
    editor, batch = tiny_editor(), tiny_facts[:20]
    config, templates = editor.config, editor.state.templates
    exact = optimise_values(editor.adapter, batch, templates, config.layers[-1], config.value)
    half = config.value.model_copy(update={"dtype": "bfloat16"})
    rough = optimise_values(editor.adapter, batch, templates, config.layers[-1], half)
    assert rough.z.dtype == torch.float32
    assert not torch.equal(rough.z, exact.z)
    assert float((rough.losses - exact.losses).abs().mean()) < 0.05
    change = torch.cosine_similarity(rough.z - rough.hidden, exact.z - exact.hidden, dim=1)
    assert float(change.mean()) > 0.9
    worse = optimise_values(editor.adapter, batch, templates, config.layers[-1], half.model_copy(update={"steps": 3}))
    assert float((worse.losses - exact.losses).abs().mean()) > 0.05, "unfinished values must fail the gate"


def test_hidden_states_below_are_exact_with_a_bf16_copy_above(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet
) -> None:
    editor, batch = tiny_editor(), tiny_facts[:5]
    before = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    args = (editor.adapter, batch, editor.state.templates, editor.config.layers[-1])
    exact = optimise_values(*args, editor.config.value)
    rough = optimise_values(*args, editor.config.value.model_copy(update={"dtype": "bfloat16"}))
    assert torch.equal(rough.hidden, exact.hidden)
    for name, tensor in editor.model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name


def test_a_copy_above_shares_what_lies_below(tiny_model: ModelAdapter) -> None:
    copied = tiny_model.upper_copy(3, torch.bfloat16)
    for layer in range(tiny_model.n_layers):
        shared = copied.down_weight(layer).data_ptr() == tiny_model.down_weight(layer).data_ptr()
        assert shared == (layer < 3)
        assert copied.down_weight(layer).dtype == (torch.float32 if layer < 3 else torch.bfloat16)
    assert copied.dtype == copied.head.weight.dtype == torch.bfloat16
    assert tiny_model.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("of_model", "asked", "used"),
    [
        (torch.float16, "auto", torch.float32),
        (torch.float16, "model", torch.float16),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
    ],
)
def test_values_run_in_the_dtype_that_is_fast_or_asked_for(
    of_model: torch.dtype, asked: Any, used: torch.dtype, tiny_parts: tuple[Any, Any]
) -> None:
    model = ModelAdapter(copy.deepcopy(tiny_parts[0]).to(of_model), tiny_parts[1])
    upper = upper_layers(model, 2, ValueConfig(dtype=asked))
    assert upper.dtype == used
    assert (upper is model) == (of_model == used)
    assert model.dtype == of_model


def test_edits_with_bf16_values_take(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    exact, half = tiny_editor(), tiny_editor(value={"dtype": "bfloat16"})
    results = []
    for editor in (exact, half):
        run = editor.edit(tiny_facts[:30], batch_size=10)
        results.append(evaluate(editor, run.edits, fluency_prompts=0).edited)
    assert results[1]["efficacy_top1"].value >= results[0]["efficacy_top1"].value - 0.1
    assert results[1]["efficacy_top1"].value > 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_edited_and_undone(
    dtype: torch.dtype,
    tiny_parts: tuple[Any, Any],
    tiny_moments: dict[int, torch.Tensor],
    tiny_facts: EditSet,
    tiny_editor: Callable[..., Editor],
) -> None:
    model = copy.deepcopy(tiny_parts[0]).to(dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = ModelAdapter(model, tiny_parts[1])
    adapter.check_forward()
    editor = Editor(adapter, config=tiny_editor().config, moments=tiny_moments, progress=False)
    run = editor.edit(tiny_facts[:20], batch_size=10)
    found = evaluate(editor, run.edits, fluency_prompts=0)
    assert found.edited["efficacy_top1"].value > 0.8
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    edited = {adapter.weight_name(layer) for layer in editor.config.layers}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) == (name not in edited), name
    editor.undo(last=2)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_thousand_updates_below_half_an_ulp_are_kept(dtype: torch.dtype, tiny_parts: tuple[Any, Any]) -> None:
    """Each changes a weight by a quarter of its last place: rounded alone, all are lost; in the master they add up."""
    model = copy.deepcopy(tiny_parts[0]).to(dtype)
    adapter = ModelAdapter(model, tiny_parts[1])
    with torch.no_grad():
        adapter.down_weight(2).fill_(1.0)
    weights = EditableWeights(adapter, (2,))
    step = torch.finfo(dtype).eps / 4
    residual = torch.full((1, adapter.d_model), step)
    solution = torch.ones(adapter.d_ff, 1, dtype=torch.float64)
    alone = torch.ones(adapter.d_model, adapter.d_ff, dtype=dtype)
    for _ in range(1000):
        weights.add(2, None, residual, solution)
        alone += (residual.T @ solution.T.float()).to(dtype)
    assert bool((alone == 1).all())
    wanted = torch.full_like(alone, 1 + 1000 * step, dtype=torch.float32)
    assert torch.equal(weights.current(2), wanted.to(dtype))
