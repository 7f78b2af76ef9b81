"""The README's example, run line by line: on the tiny model here, on the real one in the slow tests."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fastedit.methods.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny"


def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    return code


def test_every_placeholder_was_filled() -> None:
    assert re.findall(r"\b[A-Z]+_(?:OUTPUT|TABLE|PLOT)\b", (ROOT / "README.md").read_text(encoding="utf-8")) == []


def test_example_runs_on_the_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, presets = tmp_path / "cache", tmp_path / "presets"
    shutil.copytree(TINY / "model", cache / "models" / "smollm2-135m")
    config = json.loads((TINY / "model" / "config.json").read_text(encoding="utf-8"))
    names = {"n_layers": "num_hidden_layers", "d_model": "hidden_size", "d_ff": "intermediate_size"}
    preset = {
        "model": {ours: config[theirs] for ours, theirs in names.items()},
        "config": {
            "layers": [2, 3, 4],
            "covariance_weight": 100,
            "value": {"steps": 20, "lr": 0.1},
            "moments": {"tokens": 2048, "window": 32},
        },
    }
    presets.mkdir(parents=True)
    (presets / "tiny.yaml").write_text(yaml.safe_dump(preset), encoding="utf-8")
    monkeypatch.setenv("FASTEDIT_CACHE", str(cache))
    monkeypatch.setitem(METHODS, "nse", replace(METHODS["nse"], presets=tmp_path / "presets"))
    monkeypatch.chdir(tmp_path)
    exec(compile(example(), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "efficacy_top1" in printed
    assert (tmp_path / "edited" / "model.safetensors").is_file()


@pytest.mark.slow
def test_example_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example(), "README.md", "exec"), {})
    assert "Rome" in capsys.readouterr().out.splitlines()[0]
