"""`fastedit suggest`: derived settings beside others, as a preset file and a picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from fastedit.cli.main import app
from fastedit.editing.calibration import Calibration, CheckedFact
from fastedit.editing.suggest import MARGIN, Candidate, Suggestion, suggest
from fastedit.editor import Editor
from fastedit.methods.base import CannotDerive
from fastedit.methods.presets import derived_settings, load_preset
from fastedit.methods.registry import METHODS
from fastedit.model.adapter import ModelAdapter

MODEL = str(Path(__file__).resolve().parents[1] / "tiny" / "model")
SHORT = {"moments": {"tokens": 1024, "window": 64}}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["suggest", MODEL, *arguments])


def checked(took: int, perplexity: float = 1.0, unchecked: str | None = None) -> Calibration:
    facts = tuple(CheckedFact("p", "a", "b", "b", at < took, at < took, 1.0) for at in range(10))
    return Calibration(facts, perplexity, 1.0, unchecked)


def test_the_derived_settings_are_kept_unless_another_is_clearly_better(tiny_model: ModelAdapter) -> None:
    config = derived_settings(METHODS["nse"], tiny_model, {})

    def best(*found: Calibration | None) -> str:
        candidates = tuple(Candidate(f"layers {at}", config, one) for at, one in enumerate(found))
        return Suggestion("nse", {}, candidates).best.name

    assert best(checked(9), checked(10)) == "layers 1"
    assert best(checked(10), checked(10)) == "layers 0"
    assert best(checked(10, 1.0 + MARGIN / 2), checked(10)) == "layers 0"
    assert best(checked(10, 1.2), checked(10)) == "layers 1"
    # What failed or was not checked is never preferred.
    assert best(checked(7), checked(10, 1.3), checked(10, unchecked="no time"), None) == "layers 0"
    assert best(checked(1), checked(8)) == "layers 1"


def test_other_layers_are_tried_beside_the_derived_ones(tiny_model: ModelAdapter) -> None:
    found = suggest(tiny_model, METHODS["memit"], SHORT, progress=False)
    first: Any = found.candidates[0].config
    assert first == derived_settings(METHODS["memit"], tiny_model, SHORT)
    assert len(found.candidates) > 2
    for candidate in found.candidates:
        layers: Any = candidate.config
        assert candidate.name == f"layers {layers.layers[0]}-{layers.layers[-1]}".replace("0-0", "0")
        assert candidate.config == derived_settings(METHODS["memit"], tiny_model, {**SHORT, "layers": layers.layers})

    fixed = suggest(tiny_model, METHODS["memit"], {**SHORT, "layers": [2, 3]}, progress=False)
    assert [candidate.name for candidate in fixed.candidates] == ["layers 2-3"]
    rates = suggest(tiny_model, METHODS["fine"], progress=False)
    assert len(rates.candidates) == 3
    assert all(candidate.name.startswith("train.lr ") for candidate in rates.candidates)
    (only,) = suggest(tiny_model, METHODS["kn"], progress=False).candidates
    assert str(only) == "derived: not checked"


def test_the_file_is_a_preset_of_the_model(tiny_model: ModelAdapter, tmp_path: Path) -> None:
    found = suggest(tiny_model, METHODS["nse"], SHORT, progress=False)
    path = tmp_path / "own.yaml"
    path.write_text(found.yaml(), encoding="utf-8")
    assert load_preset("nse", path) == found.best.config

    editor = Editor(tiny_model, "nse", preset=path, progress=False)
    assert editor.settings.origin == str(path)
    data = yaml.safe_load(found.yaml())
    assert set(data) == {"origin", "model", "config"}
    assert data["model"]["d_ff"] == tiny_model.d_ff


def test_a_method_that_derives_nothing_is_refused(tiny_model: ModelAdapter) -> None:
    with pytest.raises(CannotDerive, match="own derives no settings"):
        suggest(tiny_model, replace(METHODS["nse"], name="own", derive=None), progress=False)


def test_the_command_writes_settings_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "own.yaml", tmp_path / "map.png"
    done = run("--out", str(out), "--plot", str(plot), "--moment-tokens", "1024", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["best"] in [row["name"] for row in data["candidates"]]
    assert all(row["calibration"]["unchecked"] for row in data["candidates"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert load_preset("nse", out).moments.tokens == 1024  # type: ignore[attr-defined]

    again = run("--out", str(out), "--moment-tokens", "1024")
    assert again.exit_code == 2
    assert "own.yaml" in again.stderr
    assert "loading" not in again.stderr


def test_without_a_file_the_settings_are_printed() -> None:
    done = run("--method", "fine")
    assert done.exit_code == 0, done.output
    assert "suggested: train.lr " in done.stdout
    assert yaml.safe_load(done.stdout[done.stdout.index("origin:") :])["config"]["train"]["lr"] > 0
    assert "fine, train.lr " in done.stderr
    assert run("--set", "rounds=0").exit_code == 2
