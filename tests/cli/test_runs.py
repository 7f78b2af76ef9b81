"""Run directories on the command line: edit, log, diff, undo, replay and export, as users type them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from fastedit.cli.main import app
from fastedit.config import MomentConfig
from fastedit.editing.export import delta
from fastedit.editor import Editor
from fastedit.methods.closed_form.config import NSEConfig
from fastedit.methods.closed_form.nse import nse
from fastedit.methods.closed_form.recipe import ClosedFormMethod
from fastedit.methods.closed_form.second_moments import second_moments
from fastedit.methods.closed_form.solver import RidgeSolver
from fastedit.methods.registry import METHODS
from fastedit.model.background_text import Source
from fastedit.model.load import load_model, load_transformers
from fastedit.records.load import load_edits
from fastedit.runs.head import HEAD
from fastedit.runs.log import RunLog

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "tiny"
MODEL, FACTS, TEXT = str(TINY / "model"), str(TINY / "facts.jsonl"), str(TINY / "text.txt")
EDIT = ["edit", MODEL, FACTS, "--batch-size", "2", "--moments", TEXT, "--no-eval"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def asked(*arguments: str) -> dict:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(autouse=True)
def tiny_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets as a user with the tiny model would have them."""
    config = json.loads((TINY / "model" / "config.json").read_text(encoding="utf-8"))
    preset = {
        "model": {
            "n_layers": config["num_hidden_layers"],
            "d_model": config["hidden_size"],
            "d_ff": config["intermediate_size"],
        },
        "config": {
            "layers": [2, 3, 4],
            "covariance_weight": 100,
            "value": {"steps": 10, "lr": 0.1},
            "moments": {"tokens": 4096, "window": 64},
        },
    }
    folder = tmp_path / "presets"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(preset), encoding="utf-8")
    monkeypatch.setitem(METHODS, "nse", replace(METHODS["nse"], presets=tmp_path / "presets"))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    done = run(*EDIT, "--limit", "6", "--run-dir", str(tmp_path / "run"), "--canaries", "2")
    assert done.exit_code == 0, done.output
    return str(tmp_path / "run")


def weights(place: Path) -> dict[str, torch.Tensor]:
    return load_transformers(str(place), "float32")[0].state_dict()


def same(left: Path, right: Path) -> bool:
    first, second = weights(left), weights(right)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("command", ["edit", "undo", "replay"])
def test_a_lost_head_is_told_once(command: str, folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    commands = {
        "edit": [*EDIT, "--limit", "6", "--run-dir", folder, "--resume"],
        "undo": ["undo", folder, "--edit", "3"],
        "replay": ["replay", folder, "--save", str(tmp_path / "saved")],
    }
    (Path(folder) / HEAD).unlink()
    done = run(*commands[command])
    assert done.exit_code == 0, done.output
    assert sum("no head counts the records" in line.getMessage() for line in caplog.records) == 1


def test_records_that_were_taken_back_are_written_when_given_again(folder: str) -> None:
    assert asked("undo", folder, "--last", "3")["batches"] == 0
    assert asked(*EDIT, "--limit", "6", "--run-dir", folder, "--resume")["n_edits"] == 6
    assert asked("undo", folder, "--last", "1")["batches"] == 2


def test_undo_then_replay_is_the_model_that_never_had_it(folder: str, tmp_path: Path) -> None:
    assert asked("undo", folder, "--last", "1") == {"batches": 2, "taken_back": 1}
    assert asked("replay", folder, "--save", str(tmp_path / "two"))["edits"] == 4
    done = run(*EDIT, "--limit", "4", "--save", str(tmp_path / "never"))
    assert done.exit_code == 0, done.output
    assert same(tmp_path / "two", tmp_path / "never")
    assert asked("undo", folder, "--to", "0")["batches"] == 0
    assert asked("replay", folder, "--onto", MODEL, "--save", str(tmp_path / "none"))["edits"] == 0
    assert same(tmp_path / "none", Path(MODEL))


def test_resume_goes_on_or_finds_nothing_to_do(folder: str) -> None:
    again = run(*EDIT, "--limit", "6", "--run-dir", folder)
    assert again.exit_code == 2
    assert "resume it (resume=True, --resume)" in again.output
    more = asked(*EDIT, "--limit", "6", "--run-dir", folder, "--resume")
    assert more["n_edits"] == 6
    assert len([r for r in RunLog(folder).records if r.kind == "batch"]) == 3
    alone = run(*EDIT, "--resume")
    assert alone.exit_code == 2
    assert "--resume needs --run-dir" in alone.output


def test_log_and_diff(folder: str) -> None:
    told = asked("log", folder, "--verify")
    assert told["batches"] == 3
    assert told["edits"] == 6
    assert [row["kind"] for row in told["records"]] == ["run", "stream", "batch", "batch", "batch", "outcome"]
    assert told["records"][2]["report"]["measured"]["unchanged"] <= 1
    changed = asked("diff", folder)["layers"]
    assert set(changed) == {"2", "3", "4"}
    assert all(0 < found["share"] < 1 and found["norm"] > 0 for found in changed.values())
    text = run("log", folder).stdout
    assert "in force (*): 3 batches with 6 edits" in text
    assert "most changed" in run("diff", folder).stdout


def test_one_edit_taken_back(folder: str) -> None:
    case = asked("log", folder)["records"][3]["case_ids"][0]
    found = asked("undo", folder, "--edit", str(case))
    assert found["case_id"] == case
    assert found["batches"] == 2
    assert asked("log", folder)["edits"] == 5
    wrong = run("undo", folder, "--edit", "nobody")
    assert wrong.exit_code == 2
    assert "no edit with case_id 'nobody'" in wrong.output


def test_undo_leaves_no_run_that_cannot_be_replayed(folder: str, tmp_path: Path) -> None:
    """The first of three batches is damaged: no batch may stay."""
    path = Path(folder) / "000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = Path(folder, "log.jsonl").read_bytes()
    for choice in (["--last", "1"], ["--to", "1"]):
        refused = run("undo", folder, *choice)
        assert refused.exit_code == 2
        assert "000002.safetensors" in refused.output
        assert "fastedit undo --to 0" in refused.output
    assert Path(folder, "log.jsonl").read_bytes() == before

    assert asked("undo", folder, "--to", "0") == {"batches": 0, "taken_back": 3}
    assert asked("replay", folder, "--save", str(tmp_path / "none"))["edits"] == 0


@pytest.fixture
def given(tmp_path: Path) -> tuple[Editor, dict[int, torch.Tensor]]:
    """An editor with a run of three batches, whose second moments were given as tensors; and these."""
    adapter = load_model(MODEL)
    config = {"layers": [2, 3], "covariance_weight": 100, "value": {"steps": 4, "lr": 0.1}, "residual_min": 0.1}
    source, windows = Source(Path(TEXT)), MomentConfig(tokens=4096, window=64)
    moments = second_moments(adapter, [2, 3], source, windows, tmp_path / "moments", show=False)
    editor = Editor(adapter, OWN, config, moments, progress=False)
    editor.edit(load_edits(FACTS, limit=6), 2, run_dir=tmp_path / "given")
    return editor, moments


OWN = ClosedFormMethod(
    name="own", config_class=NSEConfig, recipe=nse, solver=lambda moment, config: RidgeSolver(moment, 90.0)
)


def test_a_run_of_a_method_of_ones_own(given: tuple[Editor, dict[int, torch.Tensor]], tmp_path: Path) -> None:
    editor, moments = given
    folder = str(tmp_path / "given")
    assert asked("log", folder, "--verify")["edits"] == 6

    for to, edits in ((None, 6), (1, 2)):
        told = asked("diff", folder, *([] if to is None else ["--to", str(to)]))
        if to is not None:
            editor.undo(to=to)
        assert told["edits"] == edits
        norms = {str(layer): float(delta(editor.weights, layer).norm()) for layer in (2, 3)}
        assert {layer: found["norm"] for layer, found in told["layers"].items()} == norms

    case = str(editor.edits[0].case_id)
    refused = run("undo", folder, "--edit", case)
    assert refused.exit_code == 2
    assert f"pass it as method= in Python, Editor.resume('{folder}', method=...)" in refused.output
    again = Editor.resume(folder, load_model(MODEL), OWN, moments, progress=False)
    assert again.forget(editor.edits[0].case_id).batches == 1
    assert asked("undo", folder, "--last", "1") == {"batches": 0, "taken_back": 1}


def test_an_edit_of_a_run_whose_second_moments_were_given_as_tensors(
    given: tuple[Editor, dict[int, torch.Tensor]], tmp_path: Path
) -> None:
    """There is no option for tensors: the error says how it is done in Python, and that works."""
    own, moments = given
    folder = str(tmp_path / "tensors")
    editor = Editor(load_model(MODEL), "nse", own.config, moments, progress=False)
    editor.edit(load_edits(FACTS, limit=6), 2, run_dir=folder)
    before = Path(folder, "log.jsonl").read_bytes()

    refused = run("undo", folder, "--edit", "3")
    assert refused.exit_code == 2
    assert "second moments of layers 2, 3 are not those that the run began with" in refused.output
    assert f"in Python, Editor.resume('{folder}', moments=...), whose forget and edit then work" in refused.output
    assert Path(folder, "log.jsonl").read_bytes() == before

    again = Editor.resume(folder, load_model(MODEL), moments=moments, progress=False)
    fingerprint = again.weights.fingerprint()
    assert fingerprint == editor.weights.fingerprint()
    assert again.forget(3).batches == 2
    assert again.weights.fingerprint() != fingerprint
    assert len(asked("log", folder)["records"]) > len(before.splitlines())


def test_export(folder: str, tmp_path: Path) -> None:
    found = asked("export", folder, str(tmp_path / "lora"), "--format", "lora", "--rank", "3")
    assert set(found["rank"].values()) == {3}
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert asked("export", folder, str(tmp_path / "full"))["format"] == "checkpoint"
    assert run("export", folder, str(tmp_path / "full")).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["undo", "RUN"], "say one of --last N, --to BATCH, --edit CASE_ID"),
        (["undo", "RUN", "--last", "9"], "3 batches are in force"),
        (["undo", "RUN", "--last", "1", "--to", "1"], "say one of"),
        (["log", "/nowhere"], "holds no run"),
        (["replay", "RUN", "--onto", "/nowhere", "--save", "x"], "no model at /nowhere"),
    ],
    ids=["no choice", "too many", "two choices", "no run", "no model"],
)
def test_wrong_wishes_are_named(arguments: list[str], said: str, folder: str) -> None:
    done = run(*[folder if each == "RUN" else each for each in arguments])
    assert done.exit_code == 2
    assert said in done.output


def test_damage_is_named(folder: str) -> None:
    path = Path(folder) / "000002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    for command in (["log", folder, "--verify"], ["diff", folder]):
        done = run(*command)
        assert done.exit_code == 2
        assert "000002.safetensors" in done.output


@pytest.mark.parametrize("fault", ["record", "record gone, log lost", "log line"])
def test_a_damaged_run_is_read_up_to_the_damage_and_rescued(fault: str, folder: str, tmp_path: Path) -> None:
    """Three batches in records 2 to 4; the third is damaged, or cannot be reached."""
    done = run(*EDIT, "--limit", "4", "--save", str(tmp_path / "wanted"))
    assert done.exit_code == 0, done.output
    path, log = Path(folder) / "000004.safetensors", Path(folder) / "log.jsonl"
    if fault == "record":
        path.write_bytes(path.read_bytes()[:-9])
    elif fault == "log line":
        log.write_bytes(log.read_bytes().replace(b'"record":4', b'"record":5'))
    else:
        Path(folder, "000005.safetensors").write_bytes(path.read_bytes())
        path.unlink()
        log.unlink()

    for command in (["diff", folder], ["replay", folder, "--save", str(tmp_path / "all")]):
        told = run(*command)
        assert told.exit_code == 2, told.output
        assert "000004.safetensors" in told.output or "log.jsonl line 5" in told.output
    told = run("log", folder, *(["--verify"] if fault == "record" else []))
    assert told.exit_code == 2
    assert f"in force (*): {2 if 'gone' in fault else 3} batches" in told.stdout

    assert asked("diff", folder, "--to", "2")["edits"] == 4
    assert asked("replay", folder, "--to", "2", "--save", str(tmp_path / "read"))["edits"] == 4
    assert same(tmp_path / "read", tmp_path / "wanted")

    assert asked("undo", folder, "--to", "2")["batches"] == 2
    assert asked("log", folder)["batches"] == 2
    assert asked("replay", folder, "--save", str(tmp_path / "rescued"))["edits"] == 4
    assert same(tmp_path / "rescued", tmp_path / "wanted")
