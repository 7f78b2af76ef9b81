"""Presets of one's own, from a file; what is wrong with one names the file and the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastedit.editor import Editor
from fastedit.methods.closed_form.config import NSEConfig
from fastedit.methods.presets import check_settings, load_preset, settings_for
from fastedit.methods.registry import METHODS
from fastedit.model.adapter import ModelAdapter

GOOD = "model: {n_layers: 8, d_model: 64, d_ff: 192}\nconfig: {layers: 2-4, covariance_weight: 100}\n"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(GOOD, encoding="utf-8")
    return path


def test_a_file_is_read_like_a_shipped_preset(own: Path, tiny_model: ModelAdapter) -> None:
    wanted = NSEConfig(layers=(2, 3, 4), covariance_weight=100, rounds=3)
    for name in (own, str(own)):
        assert load_preset("nse", name, rounds=3) == wanted
        assert settings_for(METHODS["nse"], tiny_model, name, {"rounds": 3}) == wanted
    assert Editor(tiny_model, "nse", preset=own).weights.layers == (2, 3, 4)


def test_a_file_of_another_shape_warns(own: Path, tiny_model: ModelAdapter, caplog: pytest.LogCaptureFixture) -> None:
    settings_for(METHODS["nse"], tiny_model, own)
    assert caplog.text == ""
    own.write_text(GOOD.replace("n_layers: 8", "n_layers: 9"), encoding="utf-8")
    settings_for(METHODS["nse"], tiny_model, own)
    assert f"preset {own} was made for a model of {{'n_layers': 9" in caplog.text


def test_a_file_may_hold_settings_alone(own: Path, tiny_model: ModelAdapter, caplog: pytest.LogCaptureFixture) -> None:
    own.write_text("config: {layers: [1], covariance_weight: 2}\n", encoding="utf-8")
    assert settings_for(METHODS["nse"], tiny_model, own) == NSEConfig(layers=(1,), covariance_weight=2)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("2-4", "8-4"), ": layers must be a list of layers (4-8 or 4,6,8), got '8-4'"),
        (GOOD.replace("layers: 2-4, ", ""), ": layers is missing, and has no default"),
        (GOOD.replace("100}", "100, layres: 1}"), ": unknown setting layres; did you mean layers?"),
        (GOOD.replace("100", "!x 100"), ":2:42: holds a tag"),
        (GOOD.replace("100", "*a"), ":2:42: holds an anchor or alias"),
        (GOOD.replace("}", ""), ":2:7: is not YAML: "),
        (GOOD + GOOD, ":3:1: holds 'model' twice"),
        (
            "[1, 2]",
            ": a preset must hold a mapping `config`, and beside it `model` and `origin` or neither, got [1, 2]",
        ),
        ("", ": a preset must hold a mapping `config`, and beside it `model` and `origin` or neither, got None"),
        (
            "layers: [1]",
            ": a preset must hold a mapping `config`, and beside it `model` and `origin` or neither, got layer",
        ),
        (GOOD + "seed: 1\n", ": a preset has origin, model, config, and no 'seed'"),
        (
            GOOD.replace("n_layers", "layers"),
            ": model must hold n_layers, d_model, d_ff, three whole numbers, got {'lay",
        ),
        (GOOD.replace("192", "many"), ": model must hold n_layers, d_model, d_ff, three whole numbers, got {'n_l"),
    ],
    ids=[
        "value",
        "missing",
        "name",
        "tag",
        "alias",
        "broken",
        "twice",
        "list",
        "empty",
        "no-config",
        "part",
        "shape",
        "size",
    ],
)
def test_what_is_wrong_names_the_file_and_the_field(own: Path, text: str, message: str) -> None:
    own.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^") as wrong:
        load_preset("nse", own)
    for line in str(wrong.value).splitlines():
        assert line.startswith(str(own))
    assert str(wrong.value).startswith(f"{own}{message}")


def test_a_file_that_is_no_text_is_named(own: Path) -> None:
    own.write_bytes(b"PK\x03\x04\x00\x00")
    with pytest.raises(ValueError, match=r"own\.yaml: must be UTF-8 text, and is a zip archive"):
        load_preset("nse", own)
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml"):
        load_preset("nse", own.with_name("gone.yaml"))
    with pytest.raises(IsADirectoryError):
        load_preset("nse", own.parent)


def test_a_name_that_is_nearly_one_is_told(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no preset 'smollm-135m'; there are .*; did you mean smollm2-135m\?$"):
        load_preset("nse", "smollm-135m")
    monkeypatch.chdir(own.parent)
    with pytest.raises(ValueError, match=r"the file is named with its ending, own\.yaml$"):
        load_preset("nse", "own")


def test_settings_are_judged_before_a_model_is_read() -> None:
    for changes in ({"rouds": 1}, {"rounds": 0}):
        with pytest.raises(ValueError, match=r"roun?ds"):
            Editor.from_pretrained("/no/such/model", config=changes)
    with pytest.raises(ValueError, match="no preset 'x'"):
        Editor.from_pretrained("/no/such/model", preset="x")
    with pytest.raises(ValueError, match="method must be one of"):
        Editor.from_pretrained("/no/such/model", "magic")
    with pytest.raises(TypeError, match="wanted settings or a mapping of changes, got str"):
        check_settings(METHODS["nse"], config="rounds=2")  # type: ignore[arg-type]
