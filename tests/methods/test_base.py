"""A method of one's own: passed to the editor as an object, it takes part in everything a shipped one does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastedit import METHODS, Editor, KNConfig, NSEConfig, RunError
from fastedit.methods.closed_form.nse import NSE, nse
from fastedit.methods.closed_form.recipe import ClosedFormMethod
from fastedit.methods.closed_form.solver import PastKeys
from fastedit.methods.columns.kn import KN
from fastedit.methods.presets import load_preset, presets
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import EditSet

FAST = {"value": {"steps": 4, "lr": 0.1}, "mass": 0.8}


class DenseSolver:
    """The ridge system, formed and solved whole in float64."""

    def __init__(self, moment: Tensor, config: NSEConfig) -> None:
        self.background = config.covariance_weight * moment.double()
        self.indices: list[Tensor | None] = []

    def solve(self, keys: Tensor, past: PastKeys, index: Tensor | None = None) -> Tensor:
        """X, (k, n_edits) float64."""
        self.indices.append(index)
        rows = keys.double() if past.rows is None else torch.cat([past.rows.double(), keys.double()])
        system = self.background + rows.T @ rows
        if past.dense is not None:
            system += past.dense.double()
        chosen = torch.arange(len(system)) if index is None else index
        return torch.linalg.solve(system[chosen][:, chosen], keys.double()[:, chosen].T)


OWN = ClosedFormMethod(name="dense-nse", config_class=NSEConfig, recipe=nse, solver=DenseSolver)


@pytest.fixture
def own_editor(tiny_editor: Callable[..., Editor]) -> Callable[[], Editor]:
    """Editors with the method above and the settings of the tiny NSE."""

    def make() -> Editor:
        plain = tiny_editor(**FAST)
        return Editor(plain.adapter, OWN, plain.config, plain.stream.moments, progress=False)

    return make


def test_an_own_solver_writes_the_selected_neurons(
    own_editor: Callable[[], Editor], tiny_editor: Callable[..., Editor], tiny_facts: EditSet
) -> None:
    own, shipped = own_editor(), tiny_editor(**FAST)
    for editor in (own, shipped):
        editor.edit(tiny_facts[:6], batch_size=3)

    for layer in own.weights.layers:
        change = own.weights.current(layer) - own.weights.original(layer)
        wanted = shipped.weights.current(layer) - shipped.weights.original(layer)
        assert (change - wanted).norm() < 1e-4 * wanted.norm()
        # The solver was asked for fewer neurons than the layer has.
        indices: Any = own.state.solvers[layer].indices
        assert all(0 < len(index) < own.adapter.d_ff for index in indices)


def test_an_own_method_is_undone_recorded_and_resumed(
    own_editor: Callable[[], Editor], tiny_editor: Callable[..., Editor], tiny_facts: EditSet, tmp_path: Path
) -> None:
    editor = own_editor()
    before = editor.weights.fingerprint()
    editor.edit(tiny_facts[:3], run_dir=tmp_path / "run")
    once = editor.weights.fingerprint()
    editor.edit(tiny_facts[3:6])

    editor.undo()
    assert editor.weights.fingerprint() == once

    fresh = tiny_editor().adapter
    with pytest.raises(RunError, match="written by a method of your own, 'dense-nse'; pass it as method="):
        Editor.resume(tmp_path / "run", fresh)
    resumed = Editor.resume(tmp_path / "run", fresh, method=OWN, moments=editor.stream.moments, progress=False)
    assert resumed.weights.fingerprint() == once

    resumed.undo()
    assert resumed.weights.fingerprint() == before


def test_a_method_of_ones_own_needs_a_name_of_its_own(tiny_model: ModelAdapter) -> None:
    with pytest.raises(ValueError, match="a method of your own needs a name of its own, 'nse' is a shipped one"):
        Editor(tiny_model, replace(NSE, solver=DenseSolver), {"layers": [1, 2], "covariance_weight": 5})
    unknown: Any = ClosedFormMethod
    with pytest.raises(TypeError, match="method must be a name or an object such as NSE"):
        Editor(tiny_model, unknown)


def test_a_method_without_presets_asks_for_a_config(tiny_model: ModelAdapter) -> None:
    assert presets(OWN) == []
    with pytest.raises(
        ValueError, match=r"dense-nse: no preset was made for a model of .*; give settings \(--set, config=\)"
    ):
        Editor(tiny_model, OWN)
    with pytest.raises(ValueError, match="dense-nse: no preset 'smollm2-135m'; there are none"):
        Editor(tiny_model, OWN, preset="smollm2-135m")
    with pytest.raises(TypeError, match="dense-nse needs a NSEConfig, got MEMITConfig"):
        Editor(tiny_model, OWN, load_preset("memit", "smollm2-135m"))


def test_whole_settings_may_be_a_mapping(tiny_model: ModelAdapter) -> None:
    config = Editor(tiny_model, OWN, {"layers": [1, 2], "covariance_weight": 5}).config
    assert config == NSEConfig(layers=(1, 2), covariance_weight=5)
    with pytest.raises(ValueError, match="covariance_wieght"):
        Editor(tiny_model, OWN, {"layers": [1, 2], "covariance_wieght": 5})
    with pytest.raises(ValueError, match=r"give settings \(--set, config=\), of which covariance_weight is missing"):
        Editor(tiny_model, OWN, {"layers": [1, 2]})
    assert Editor(tiny_model, "kn", {"threshold": 0.5}).config == KNConfig(threshold=0.5)
    with pytest.raises(ValueError, match="dense-nse: no preset 'x'"):
        Editor(tiny_model, OWN, {"layers": [1, 2], "covariance_weight": 5}, preset="x")


def test_changes_apply_to_the_preset_of_the_model(tiny_model: ModelAdapter, tmp_path: Path) -> None:
    shape = f"{{n_layers: {tiny_model.n_layers}, d_model: {tiny_model.d_model}, d_ff: {tiny_model.d_ff}}}"
    text = f"model: {shape}\nconfig: {{layers: [1, 2], covariance_weight: 7, value: {{lr: 0.2}}}}\n"
    (tmp_path / "tiny.yaml").write_text(text, encoding="utf-8")
    method = replace(NSE, presets=tmp_path)

    editor = Editor(tiny_model, method, {"rounds": 3, "value": {"steps": 9}})
    config: Any = editor.config
    assert (config.rounds, config.value.steps, config.value.lr, config.covariance_weight) == (3, 9, 0.2, 7)
    assert Editor(tiny_model, method, preset="tiny").config.model_dump()["rounds"] == 2
    with pytest.raises(ValueError, match="pass preset= or whole settings"):
        Editor(tiny_model, method, editor.config, preset="tiny")


def test_the_token_budget_is_the_setting_that_the_method_names() -> None:
    config = load_preset("nse", "smollm2-135m")
    assert NSE.token_budget(config) == config.model_dump()["value"]["token_budget"]
    halved = NSE.with_token_budget(config, 16)
    assert halved.value.token_budget == 16
    assert halved.model_copy(update={"value": config.model_dump()["value"]}) != config
    assert NSE.with_token_budget(config, None) is config

    untrained = load_preset("kn", "smollm2-135m")
    assert KN.token_budget(untrained) is None
    assert KN.with_token_budget(untrained, 16) is untrained


def test_which_methods_read_text() -> None:
    reading = {name for name, method in METHODS.items() if method.reads_text(load_preset(name, "smollm2-135m"))}
    assert reading == {name for name, method in METHODS.items() if isinstance(method, ClosedFormMethod)} >= {"nse"}
    assert METHODS["fine"].reads_text(load_preset("fine", "smollm2-135m", common_share=0.02))
