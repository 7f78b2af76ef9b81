"""What a recorder tells of its run, and what it refuses."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from fastedit.editor import Editor
from fastedit.methods.closed_form.config import NSEConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.runs.identity import compare_machine, machine
from fastedit.runs.log import RunError, RunLog
from fastedit.runs.recorder import Recorder, Settings, describe_run

OLDER = Path(__file__).resolve().parent / "written_by_0.1.0"


def header_with(folder: Path, header: dict[str, object]) -> Recorder:
    """A run whose header says this besides what an NSE run of 0.1.0 says."""
    return Recorder.create(folder, {**RunLog(OLDER / "nse").records[0].body, **header})


def test_a_recorder_tells_the_settings(tmp_path: Path) -> None:
    recorder = Recorder(RunLog(OLDER / "nse-mass"))
    assert recorder.method_name == "nse"
    assert recorder.seed == 0
    assert recorder.text is None

    config = recorder.config(NSEConfig)
    assert config.mass == 0.8
    assert config.residual_max == float("inf")
    assert header_with(tmp_path / "text", {"moments_text": "/texts/wiki.txt"}).text == Path("/texts/wiki.txt")


def test_other_settings_are_named(tiny_model: ModelAdapter) -> None:
    recorder = Recorder(RunLog(OLDER / "nse"))
    config = recorder.config(NSEConfig)
    weights = Editor(tiny_model, "nse", config, moments={}).weights
    recorder.check(tiny_model, weights, {"method": "nse", "config": config, "seed": 0})

    rounds = config.model_copy(update={"rounds": 3})
    with pytest.raises(
        RunError, match=r"^other settings than the run's: config\.rounds is 3, was 2; seed is 1, was 0$"
    ):
        recorder.check(tiny_model, weights, {"method": "nse", "config": rounds, "seed": 1})
    with pytest.raises(RunError, match=r"^other settings than the run's: method is 'memit', was 'nse'$"):
        recorder.check(tiny_model, weights, {"method": "memit", "config": config, "seed": 0})


def test_another_model_is_named(tiny_model: ModelAdapter) -> None:
    recorder = Recorder(RunLog(OLDER / "nse"))
    config = recorder.config(NSEConfig)
    other = copy.deepcopy(tiny_model)
    other.head.weight.data[0, 0] += 1
    weights = Editor(other, "nse", config, moments={}).weights
    with pytest.raises(RunError, match=r"not the model .*\(unnamed\): weights that are not edited differ"):
        recorder.check(other, weights, {"method": "nse", "config": config, "seed": 0})


def test_what_the_machine_of_an_older_run_did_not_say_is_no_difference(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        compare_machine({"machine": {name: value for name, value in machine().items() if name != "safetensors"}})
    assert not caplog.records

    compare_machine({"machine": {**machine(), "torch": "1.0"}})
    assert "instead of 1.0" in caplog.text


def test_a_model_that_was_handed_over_cannot_be_loaded() -> None:
    with pytest.raises(RunError, match="its model was handed over loaded; hand it over again"):
        Recorder(RunLog(OLDER / "nse")).load_model()


def test_a_log_without_a_header_is_no_run(tmp_path: Path) -> None:
    log = RunLog.create(tmp_path / "run")
    with log.writing():
        log.append("stream", {})
    with pytest.raises(RunError, match="its first record does not describe a run"):
        Recorder.open(tmp_path / "run")


def test_another_config_is_named(fast_editor: Callable[..., Editor], tmp_path: Path) -> None:
    """Weights alone do not decide what a model says."""
    editor = fast_editor()
    settings: Settings = {"method": "nse", "config": editor.config, "seed": 0}
    header = describe_run(editor.adapter, editor.weights, settings, {}, None)
    recorder = Recorder.create(tmp_path / "run", header)

    same = editor.model.config
    vars(same).update(use_cache=False, pad_token_id=7, attention_dropout=0.5)
    recorder.check(editor.adapter, editor.weights, settings)

    vars(same)["rms_norm_eps"] = 0.1
    with pytest.raises(RunError, match=r"not the model .*: its config differs: rms_norm_eps is 0\.1, was 1e-0"):
        recorder.check(editor.adapter, editor.weights, settings)
