"""Derived settings: the units they are in carry over from model to model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastedit.editor import Editor
from fastedit.methods.base import CannotDerive
from fastedit.methods.closed_form.alphaedit import ALPHAEDIT, projected
from fastedit.methods.closed_form.config import AlphaEditConfig
from fastedit.methods.closed_form.derived import LAYER_SWEEP, edited_layers, measure
from fastedit.methods.columns.derived import RATE_SWEEP, column_rms
from fastedit.methods.presets import NoPreset, derived_settings, settle
from fastedit.methods.registry import METHODS
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit, EditSet
from fastedit.records.shipped import shipped_facts

# Settings are rounded to two digits, which a power of ten keeps.
FACTOR = 10.0
RANDOM_EDITS = [
    Edit(prompt="The twin of Tavisk is", subject="Tavisk", target_new="Pell"),
    Edit(prompt="The Orlen bridge is in", subject="Orlen bridge", target_new="Old Norse"),
]
STREAM_WRITERS = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")


def scaled(model: ModelAdapter, endings: dict[str, float]) -> ModelAdapter:
    """A copy in which the weights whose names end so are multiplied, and whose norms have no epsilon."""
    twin = copy.deepcopy(model.model)
    for name, parameter in twin.named_parameters():
        for ending, factor in endings.items():
            if name.endswith(ending):
                parameter.data.mul_(factor)
    for module in twin.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0
    return ModelAdapter(twin, model.tokenizer)


def untied(model: ModelAdapter) -> ModelAdapter:
    """A copy with a head of its own, in float64."""
    twin = copy.deepcopy(model.model).double()
    twin.config.tie_word_embeddings = False
    twin.lm_head.weight = torch.nn.Parameter(twin.lm_head.weight.detach().clone())
    return ModelAdapter(twin, model.tokenizer)


def logits(model: ModelAdapter) -> Tensor:
    ids = model.tokenizer("The capital of the country is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.model(ids).logits


@pytest.mark.parametrize("method", ["nse", "memit", "alphaedit", "fine", "kne"])
@pytest.mark.parametrize("unit", ["hidden states", "keys"])
def test_a_model_in_other_units_is_edited_alike(
    tiny_model: ModelAdapter, tiny_facts: EditSet, method: str, unit: str
) -> None:
    """One model twice, with hidden states ten times as long, or with keys ten times as long: the same function."""
    base = untied(tiny_model)
    changed = dict.fromkeys(STREAM_WRITERS, FACTOR)
    if unit == "keys":
        changed = {"up_proj.weight": FACTOR, "down_proj.weight": 1 / FACTOR}
    one, other = scaled(base, {}), scaled(base, changed)
    assert torch.allclose(logits(one), logits(other), atol=1e-4)

    short: dict[str, Any] = {"moments": {"tokens": 2048, "window": 64}} if METHODS[method].uses_second_moments else {}
    editors = [Editor(model, method, short, calibrate=False, progress=False) for model in (one, other)]
    first, second = (editor.config for editor in editors)
    if (unit == "hidden states") == (method in ("nse", "memit", "alphaedit")) or method in ("fine", "kne"):
        assert first != second

    before = logits(one)
    for editor in editors:
        editor.edit(tiny_facts[:3], verify=False)
    after, twin = logits(one), logits(other)
    change = float((after - before).norm())
    assert change > 1e-3
    assert float((after - twin).norm()) < 0.02 * change

    # The same settings in both are not the same edit, where the units differ.
    if first != second:
        wrong = scaled(base, changed)
        Editor(wrong, method, first, progress=False).edit(tiny_facts[:3], verify=False)
        assert float((after - logits(wrong)).norm()) > 0.02 * change


@pytest.mark.parametrize(
    ("n_layers", "layers"),
    [
        (2, (0,)),
        (4, (0,)),
        (8, (0, 1, 2)),
        (18, (1, 2, 3, 4, 5)),
        (24, (3, 4, 5, 6, 7)),
        (30, (4, 5, 6, 7, 8)),
        (32, (5, 6, 7, 8, 9)),
    ],
)
def test_layers_are_shares_of_the_depth(n_layers: int, layers: tuple[int, ...]) -> None:
    class Deep:
        post_norm = False
        shares_a_value = True

    deep: Any = Deep()
    deep.n_layers = n_layers
    assert edited_layers(deep) == layers

    # The norm behind a layer: fewer share a value, and none behind two norms.
    deep.post_norm = True
    assert edited_layers(deep) == layers[-3:]
    deep.shares_a_value = False
    assert edited_layers(deep) == layers[-1:]


def test_a_single_layer_leaves_none_below_it(tiny_model: ModelAdapter) -> None:
    model = copy.deepcopy(tiny_model.model)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    shallow = ModelAdapter(model, tiny_model.tokenizer)
    with pytest.raises(NoPreset, match="none can be derived: a closed form edits layers below the last one"):
        Editor(shallow, "memit")
    assert Editor(shallow, "fine").settings.origin == "derived"


def test_what_the_caller_sets_is_kept_and_measured_at(tiny_model: ModelAdapter) -> None:
    settled = settle(METHODS["nse"], tiny_model, config={"layers": "4-6", "value": {"steps": 7}, "rounds": 3})
    assert settled.origin == "derived"
    assert settled.config.layers == (4, 5, 6)  # type: ignore[attr-defined]
    assert settled.config.value.steps == 7  # type: ignore[attr-defined]
    at_six = measure(tiny_model, {"layers": [6]}).norm
    assert at_six != measure(tiny_model, {}).norm
    assert settled.config.residual_max == pytest.approx(at_six, rel=0.05)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="below the last layer 7, got 2,40"):
        Editor(tiny_model, "nse", {"layers": [2, 40]})


def test_alphaedit_in_traces_is_alphaedit_in_its_units() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(64, 24, generator=generator) * torch.linspace(0.01, 3, 24)
    moment = keys.T @ keys / 64
    trace = float(moment.double().trace())
    config = AlphaEditConfig(layers=(1,), units="trace", null_threshold=0.5, ridge=0.3)
    ours = projected(moment, config)
    theirs = projected(moment, AlphaEditConfig(layers=(1,), null_threshold=0.5 * trace / 24, ridge=0.3 * trace))
    assert ours.basis.shape[1] == theirs.basis.shape[1] < 24
    assert ours.ridge == pytest.approx(theirs.ridge)
    larger = projected(100 * moment, config)
    assert larger.basis.shape == ours.basis.shape
    assert larger.ridge == pytest.approx(100 * ours.ridge, rel=1e-5)


def test_published_units_of_alphaedit_stay_where_they_are_named(tiny_model: ModelAdapter) -> None:
    assert derived_settings(ALPHAEDIT, tiny_model, {}).units == "trace"  # type: ignore[attr-defined]
    named = derived_settings(ALPHAEDIT, tiny_model, {"ridge": 10.0})
    assert named.units == "absolute"  # type: ignore[attr-defined]
    assert named.null_threshold == 0.02  # type: ignore[attr-defined]


def test_a_method_without_derive_derives_none(tiny_model: ModelAdapter) -> None:
    own = replace(METHODS["nse"], name="own", derive=None, presets=None)
    with pytest.raises(CannotDerive, match="own derives no settings"):
        derived_settings(own, tiny_model, {})
    with pytest.raises(NoPreset, match="own: no preset was made"):
        Editor(tiny_model, own)


def test_sweeps_lie_around_the_derived_settings(tiny_model: ModelAdapter) -> None:
    nse: Any = derived_settings(METHODS["nse"], tiny_model, {})
    windows = LAYER_SWEEP.values(tiny_model, nse)
    assert all(window[0] >= 0 and window[-1] <= tiny_model.n_layers - 2 for window in windows)
    assert len(set(windows)) == len(windows) > 2
    fine: Any = derived_settings(METHODS["fine"], tiny_model, {})
    low, high = RATE_SWEEP.values(tiny_model, fine)
    assert low < fine.train.lr < high
    assert fine.train.lr == pytest.approx(0.026 * column_rms(tiny_model), rel=0.05)


def test_settings_do_not_depend_on_the_threads(tiny_model: ModelAdapter) -> None:
    """A run is resumed by settings that are derived again."""
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made.append([derived_settings(method, tiny_model, {}) for method in METHODS.values()])
    torch.set_num_threads(1)
    assert made[0] == made[1]


def test_the_shipped_facts_can_all_be_used() -> None:
    facts = shipped_facts()
    assert len(facts) == 80
    assert all(edit.target_true and edit.rephrase_prompts and edit.locality[0].answers for edit in facts)


@pytest.mark.parametrize("method", list(METHODS))
def test_nothing_is_tried_in_the_constructor(
    tiny_model: ModelAdapter, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Callable[..., None]:
        raise AssertionError("the constructor edited")

    monkeypatch.setattr("fastedit.editing.stream.Stream.write_batch", refuse)
    monkeypatch.setattr("fastedit.methods.closed_form.recipe.second_moments", refuse)
    editor = Editor(tiny_model, method)
    assert editor.calibration is None
    assert editor.settings.origin == "derived"


@pytest.mark.parametrize("method", ["nse", "alphaedit", "fine"])
def test_every_family_is_edited_with_derived_settings(family_adapter: ModelAdapter, method: str) -> None:
    config = {"train": {"steps": 5}} if method == "fine" else {"moments": {"tokens": 600}, "value": {"steps": 5}}
    editor = Editor(family_adapter, method, config, progress=False)
    assert editor.settings.origin == "derived"
    before = editor.weights.fingerprint()

    run = editor.edit(RANDOM_EDITS)
    assert run.written == len(RANDOM_EDITS)
    assert editor.weights.fingerprint() != before
    editor.undo(to=0)
    assert editor.weights.fingerprint() == before
