"""Shares of what is missing at the value layer; runs over several layers of post-norm models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastedit.editor import Editor
from fastedit.methods.closed_form.config import TemplateConfig, ValueConfig
from fastedit.methods.closed_form.keys import KeySweep
from fastedit.methods.closed_form.recipe import ClosedFormMethod
from fastedit.methods.closed_form.shares import share_of
from fastedit.methods.closed_form.values import optimise_values
from fastedit.methods.registry import METHODS
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit

LAYERS = (0, 1)
TEMPLATES = ("{}", "The old house. {}")
VALUE = ValueConfig(steps=8, lr=0.2, stop_loss=0)
SETTINGS: dict[str, dict[str, Any]] = {
    "nse": {"covariance_weight": 1e-2, "mass": 0.9},
    "memit": {"covariance_weight": 1e-2, "memory": True},
    "alphaedit": {"null_threshold": 0.9, "ridge": 0.1},
}
EDITS = [
    Edit(prompt="The twin of Tavisk is", subject="Tavisk", target_new="Pell", case_id=0),
    Edit(prompt="The Orlen bridge is in", subject="Orlen bridge", target_new="Old Norse", case_id=1),
    Edit(prompt="Rook said that Rook lives in", subject="Rook", target_new="the house", case_id=2),
]

post_norm = pytest.mark.parametrize("family", ["gemma2", "gemma3", "opt-350m"])


def moments() -> dict[int, Tensor]:
    draws = torch.randn(len(LAYERS), 200, 48, generator=torch.Generator().manual_seed(1))
    return {layer: part.T @ part / 200 for layer, part in zip(LAYERS, draws, strict=True)}


def editor_for(adapter: ModelAdapter, method: str, **changes: Any) -> Editor:
    kind = METHODS[method]
    assert isinstance(kind, ClosedFormMethod)
    settings = {**SETTINGS[method], **changes}
    texts = TemplateConfig(seeds=("The",), length=6)
    config = kind.config_class(layers=LAYERS, value=VALUE, templates=texts, **settings)
    return Editor(adapter, method, config, moments=moments(), progress=False)


@pytest.fixture
def fresh(family: str, family_models: dict[str, Any], random_tokenizer: Any) -> Callable[[], ModelAdapter]:
    return lambda: ModelAdapter(copy.deepcopy(family_models[family]), random_tokenizer)


@torch.no_grad()
def test_the_share_is_an_equal_part_of_the_residual(family_adapter: ModelAdapter) -> None:
    values = optimise_values(family_adapter, EDITS, TEMPLATES, LAYERS[-1], VALUE)
    layers = LAYERS[-1:] if family_adapter.post_norm else LAYERS
    with family_adapter.packed():
        captured = next(iter(KeySweep(family_adapter, EDITS, TEMPLATES, layers)))
        share = share_of(family_adapter, values, captured, layers)
    assert captured.sites is None
    assert torch.equal(share.residual, values.z - captured.hidden)
    # Granite multiplies what the feed-forward adds.
    assert torch.equal(share.written, share.residual / len(layers) / family_adapter.value_gain)


@post_norm
@torch.no_grad()
def test_behind_a_norm_every_layer_moves_the_value_layer_by_its_part(family_adapter: ModelAdapter) -> None:
    """The share at the lower layer, added to its output on the plain prompt, is a step towards the wanted state."""
    adapter = family_adapter
    values = optimise_values(adapter, EDITS, TEMPLATES, LAYERS[-1], VALUE)
    with adapter.packed():
        lower, upper = KeySweep(adapter, EDITS, TEMPLATES, LAYERS)
        below, above = share_of(adapter, values, lower, LAYERS), share_of(adapter, values, upper, LAYERS[1:])
    assert lower.sites is not None
    assert upper.sites is not None
    assert torch.equal(upper.sites.own.output, upper.sites.value.output)
    torch.testing.assert_close(lower.sites.value, upper.sites.value)
    # With nothing written in between, both say the same is missing, in the units in which one layer would say it.
    torch.testing.assert_close(below.residual, above.residual, rtol=1e-3, atol=1e-4)
    whole = values.z - values.hidden
    whole = whole - whole.mean(1, keepdim=True) if adapter.family.output_norm else whole
    torch.testing.assert_close(above.written, whole, rtol=1e-3, atol=1e-4)

    stream, output = lower.sites.own
    joined = adapter.join(LAYERS[0], stream, output + below.written) - adapter.join(LAYERS[0], stream, output)
    ends = (values.hidden, values.z)
    before, after = (adapter.join(LAYERS[1], values.stream, end) for end in ends)
    part = (after - before) / 2
    # The damping shortens the step, and no norm can lengthen what it reads.
    along = (joined * part).sum(1) / part.square().sum(1)
    assert float(along.min()) > 0.2
    assert float(along.max()) < 0.6


@post_norm
def test_values_without_their_stream_are_refused(family_adapter: ModelAdapter) -> None:
    values = replace(optimise_values(family_adapter, EDITS, TEMPLATES, LAYERS[-1], VALUE), stream=None)
    with torch.no_grad(), family_adapter.packed():
        captured = next(iter(KeySweep(family_adapter, EDITS, TEMPLATES, LAYERS)))
        with pytest.raises(ValueError, match="need the residual stream"):
            share_of(family_adapter, values, captured, LAYERS)


@post_norm
@pytest.mark.parametrize("method", SETTINGS)
def test_a_run_is_replayed_undone_and_forgotten(method: str, fresh: Callable[[], ModelAdapter], tmp_path: Path) -> None:
    editor = editor_for(fresh(), method)
    unedited = editor.weights.fingerprint()
    run = editor.edit(EDITS, batch_size=2, run_dir=tmp_path / "run")
    assert [report.error for report in run.batches] == [None, None]
    assert set(run.batches[0].norms) == set(LAYERS)
    assert all(norm > 0 for norm in run.batches[0].norms.values())

    later = Editor.resume(tmp_path / "run", fresh(), moments=moments(), progress=False)
    assert later.weights.fingerprint() == editor.weights.fingerprint() != unedited

    found = editor.forget(1)
    assert found.batches == 2
    assert [edit.case_id for edit in editor.edits] == [0, 2]
    if method == "nse":
        # Its values are those of the original weights: what is left is the run that never had the edit.
        never = editor_for(fresh(), method)
        never.edit(EDITS[:1])
        never.edit(EDITS[2:])
        for layer in LAYERS:
            change = (never.weights.current(layer) - never.weights.original(layer)).norm()
            assert (editor.weights.current(layer) - never.weights.current(layer)).norm() < 1e-3 * change

    editor.undo(last=2)
    assert editor.weights.fingerprint() == unedited


@post_norm
def test_bounds_of_the_residual_are_in_units_of_the_down_projection(family_adapter: ModelAdapter) -> None:
    values = optimise_values(family_adapter, EDITS, TEMPLATES, LAYERS[-1], VALUE)
    lengths = (values.z - values.hidden).norm(dim=1)
    assert int((lengths > lengths.median()).sum()) == 1
    editor = editor_for(family_adapter, "nse", residual_min=float(lengths.median()) * 1.001, rounds=1)
    editor.state.templates = TEMPLATES
    assert editor.edit(EDITS).batches[0].written == (1,)
