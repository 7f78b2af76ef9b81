"""Presets: found for a model, and of one's own, from a file; what is wrong with one names the file and the field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig

from fastedit.editor import Editor
from fastedit.methods.closed_form.config import NSEConfig
from fastedit.methods.presets import NoPreset, check_settings, load_preset, preset_for, settings_for
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
    assert f"preset {own} was made for another model: n_layers 9, not 8" in caplog.text


# Shapes and settings of published models, as their config.json has them.
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
}
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
}


@pytest.fixture
def model_of(random_tokenizer: Any) -> Callable[..., ModelAdapter]:
    """A model with such a config, whose weights take no memory."""

    def make(kind: type[PreTrainedConfig], **settings: Any) -> ModelAdapter:
        with FakeTensorMode():
            return ModelAdapter(AutoModelForCausalLM.from_config(kind(**settings)), random_tokenizer)

    return make


class TestFoundForAModel:
    """A preset is taken where everything agrees that it says of its model."""

    def test_its_own(self, model_of: Callable[..., ModelAdapter]) -> None:
        for method in ("nse", "memit", "alphaedit", "fine"):
            model = model_of(LlamaConfig, **LLAMA_3_8B)
            assert preset_for(method, model) == load_preset(method, "llama-3-8b")
        for method in METHODS:
            assert preset_for(method, model_of(LlamaConfig, **SMOLLM2)) == load_preset(method, "smollm2-135m")
        assert preset_for("nse", model_of(GPT2Config, n_layer=48, n_embd=1600, n_head=25)) == load_preset(
            "nse", "gpt2-xl"
        )

    def test_not_that_of_a_namesake_in_shape(self, model_of: Callable[..., ModelAdapter]) -> None:
        """Mistral 7B has the shape of Llama 3 8B."""
        rope = {"rope_theta": 10000.0, "rope_type": "default"}
        model = model_of(MistralConfig, **{**LLAMA_3_8B, "vocab_size": 32000, "rope_parameters": rope})
        with pytest.raises(NoPreset, match=r"llama-3-8b has its shape, but model_type llama, not mistral, vocab_size"):
            preset_for("nse", model)
        with pytest.raises(NoPreset, match=r"rope_theta 500000, not 10000\.0\); name one of gpt-j-6b"):
            preset_for("nse", model)

    def test_another_shape_is_named_and_the_presets_listed(self, tiny_model: ModelAdapter) -> None:
        shape = r"made for a model of \{'n_layers': 8, 'd_model': 64, 'd_ff': 192\}; .*smollm2"
        with pytest.raises(NoPreset, match=shape) as wrong:
            preset_for("nse", tiny_model)
        assert str(wrong.value).endswith("smollm2-135m (--preset, preset=) or give settings (--set, config=)")

    def test_a_preset_that_is_named_for_a_namesake_warns(
        self, model_of: Callable[..., ModelAdapter], caplog: pytest.LogCaptureFixture
    ) -> None:
        model = model_of(LlamaConfig, **{**LLAMA_3_8B, "vocab_size": 32000})
        settings_for(METHODS["nse"], model, "llama-3-8b")
        assert "preset llama-3-8b was made for another model: vocab_size 128256, not 32000" in caplog.text


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
            ": model must hold n_layers, d_model, d_ff, and may hold model_type, vocab_size, n_heads, n_kv_heads,"
            " rope_theta, got {'lay",
        ),
        (GOOD.replace("192", "many"), ": model.d_ff must be a whole number, got 'many'"),
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


def test_a_preset_of_another_method_says_of_which(own: Path) -> None:
    own.write_text("config: {layers: 2-4, covariance_weight: 100}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^") as wrong:
        load_preset("fine", own)
    *unknown, last = str(wrong.value).splitlines()
    assert [line.split(";")[0] for line in unknown] == [
        f"{own}: unknown setting {name}" for name in ("layers", "covariance_weight")
    ]
    assert last == f"{own}: these are settings of nse or memit, not of fine; name it (--method, method=)"

    own.write_text("config: {layers: 2-4, covariance_weight: 100, rounds: 2, mass: 0.9}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"these are settings of nse, not of fine"):
        load_preset("fine", own)


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
