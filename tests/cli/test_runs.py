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
from fastedit.methods.registry import METHODS
from fastedit.model.load import load_transformers
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
