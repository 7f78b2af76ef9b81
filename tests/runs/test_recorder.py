"""What a recorder tells of its run, and what it refuses."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastedit.cli.main import app
from fastedit.editor import Editor
from fastedit.methods.closed_form.config import NSEConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import EditSet
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


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"FASTEDIT_BACKEND": "torch"}, "backend torch instead of automatic"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "capability DEFAULT instead of"),
        ({"FASTEDIT_ISA": "baseline"}, "kernels .*cpp baseline instead of .*cpp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_backend_or_instruction_set_is_told(environment: dict[str, str], told: str) -> None:
    """As a run sees it that is resumed in a process with this environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FASTEDIT_", "ATEN_"))}
    script = "import json; from fastedit.runs.identity import machine; print(json.dumps(machine()))"
    was, now = (
        json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env).stdout)
        for env in (clean, clean | environment)
    )
    if was == now or (was["kernels"] == "none" and "FASTEDIT_ISA" in environment):
        pytest.skip("this processor has nothing else")

    differ = {name: (now[name], was[name]) for name in now if now[name] != was[name]}
    assert re.search(told, "; ".join(f"{name} {new} instead of {old}" for name, (new, old) in differ.items()))


def test_a_batch_says_what_it_was_made_with(
    fast_editor: Callable[..., Editor],
    stream: EditSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fast_editor().edit(stream[:3], 3, run_dir=tmp_path / "run")
    monkeypatch.setenv("FASTEDIT_BACKEND", "torch")
    with caplog.at_level(logging.WARNING):
        fast_editor().edit(stream[3:6], 3, run_dir=tmp_path / "run", resume=True)
    assert "backend torch instead of automatic" in caplog.text

    bodies = [record.body for record in RunLog(tmp_path / "run").records]
    assert bodies[0]["machine"] == {**machine(), "backend": "automatic"}
    assert [body.get("made_with") for body in bodies if body["kind"] == "batch"] == [None, {"backend": "torch"}]
    told = CliRunner().invoke(app, ["log", str(tmp_path / "run")]).stdout
    assert "; made with backend torch" in told
    assert f"capability {machine()['capability']}" in told


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
