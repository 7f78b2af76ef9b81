"""Settings are checked where they are made, and every preset that ships is valid."""

import pytest
import yaml

from fastedit.config import changed, parse_changes
from fastedit.methods.closed_form.config import ClosedFormConfig, NSEConfig, TemplateConfig, ValueConfig
from fastedit.methods.presets import load_preset, preset_for, presets
from fastedit.methods.registry import METHODS

PRESETS = [(method, name) for method in METHODS for name in presets(method)]


@pytest.mark.parametrize(("method", "name"), PRESETS)
def test_a_preset_loads_and_is_found_by_the_shape_it_was_made_for(method, name):
    config = load_preset(method, name)
    assert isinstance(config, METHODS[method].config_class)
    text = (METHODS[method].presets / f"{name}.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    assert set(data) == {"origin", "model", "config"}
    assert data["origin"]
    assert set(data["model"]) == {"n_layers", "d_model", "d_ff"}
    if isinstance(config, ClosedFormConfig):
        assert max(config.layers) < data["model"]["n_layers"]
    assert preset_for(method, **data["model"]) == config
    for field, value in data["config"].items():
        if isinstance(value, int | float):
            assert getattr(config, field) == value


def test_every_file_among_the_presets_is_a_preset_of_a_method():
    packages = {method.presets.parent for method in METHODS.values()}
    found = sorted((file.parent.name, file.stem) for package in packages for file in package.glob("*/*"))
    assert found == sorted(PRESETS)
    assert ("nse", "smollm2-135m") in found


def test_changes_override_the_preset():
    config = load_preset("nse", "smollm2-135m", rounds=5, value={"steps": 3})
    assert (config.rounds, config.value.steps) == (5, 3)
    assert config.layers == load_preset("nse", "smollm2-135m").layers


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match="layres"):
        load_preset("nse", "smollm2-135m", layres=[1])
    with pytest.raises(ValueError, match=r"value\.stpes"):
        load_preset("nse", "smollm2-135m", value={"stpes": 3})


@pytest.mark.parametrize("layers", [[], [3, 2], [1, 1], [-1, 2], ["a"], None])
def test_bad_layers_are_refused_by_name(layers):
    with pytest.raises(ValueError, match="layers"):
        NSEConfig(layers=layers, covariance_weight=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("mass", 0), ("mass", 1.01), ("rounds", 0), ("covariance_weight", 0), ("covariance_weight", "much")],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        NSEConfig(**{"layers": [1], "covariance_weight": 1, field: value})


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (ValueConfig, "steps", 1),
        (ValueConfig, "lr", 0),
        (ValueConfig, "clamp", -1),
        (ValueConfig, "stop_after_top1", 0),
        (TemplateConfig, "length", 1),
    ],
)
def test_parts_check_their_own_fields(kind, field, value):
    with pytest.raises(ValueError, match=field):
        kind(**{field: value})


def test_a_config_cannot_be_changed():
    config = load_preset("nse", "smollm2-135m")
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 3


def test_an_unknown_preset_or_method_lists_what_there_is():
    with pytest.raises(ValueError, match=r"'nonsense'; there are .*smollm2-135m"):
        load_preset("nse", "nonsense")
    with pytest.raises(ValueError, match=r"one of .*nse.*'nonsense'"):
        load_preset("nonsense", "smollm2-135m")


def test_a_shape_without_a_preset_is_named_and_the_presets_listed():
    with pytest.raises(ValueError, match=r"'d_model': 577.*smollm2-135m"):
        preset_for("nse", 30, 577, 1536)


def test_a_change_leaves_the_rest_of_its_part_as_it_is():
    config = load_preset("nse", "smollm2-135m")
    other = changed(config, {"value": {"steps": 7}})
    assert other.value == config.value.model_copy(update={"steps": 7})
    assert other.moments == config.moments


def test_assignments_become_changes():
    found = parse_changes(["rounds=2", "value.steps=10", "value.lr=1e-1", "memory=true", "layers=[1, 2]"])
    assert found == {"rounds": 2, "value": {"steps": 10, "lr": "1e-1"}, "memory": True, "layers": [1, 2]}
    assert changed(load_preset("nse", "smollm2-135m"), {"value": {"lr": "1e-1"}}).value.lr == 0.1


@pytest.mark.parametrize("wrong", ["rounds", "=2", "value.=3", ".steps=3"])
def test_a_setting_without_a_name_is_refused(wrong):
    with pytest.raises(ValueError, match="must look like"):
        parse_changes([wrong])


def test_a_part_set_as_a_whole_and_in_detail_is_refused():
    with pytest.raises(ValueError, match="set twice"):
        parse_changes(["value=3", "value.steps=3"])
