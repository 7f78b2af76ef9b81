"""Records on the command line: which form was read towards which target, and what was skipped, is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from fastedit.cli.main import app
from fastedit.methods.registry import METHODS
from fastedit.records.edit import EditSet

TINY = Path(__file__).resolve().parents[1] / "tiny"
MODEL, TEXT = str(TINY / "model"), str(TINY / "text.txt")
QUICK = ("--moments", TEXT, "--moment-tokens", "2048", "--fluency-prompts", "0")
Write = Callable[[list[Any]], str]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def done(*arguments: str) -> tuple[dict[str, Any], str]:
    """What stands on standard output, as JSON, and what on standard error."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


@pytest.fixture(autouse=True)
def tiny_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset as a user with the tiny model would have it."""
    config = json.loads((TINY / "model" / "config.json").read_text(encoding="utf-8"))
    names = {"n_layers": "num_hidden_layers", "d_model": "hidden_size", "d_ff": "intermediate_size"}
    preset = {
        "model": {ours: config[theirs] for ours, theirs in names.items()},
        "config": {"layers": [2, 3, 4], "covariance_weight": 100, "value": {"steps": 15, "lr": 0.1}},
    }
    folder = tmp_path / "presets"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(preset), encoding="utf-8")
    monkeypatch.setitem(METHODS, "nse", replace(METHODS["nse"], presets=tmp_path / "presets"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(records: list[Any]) -> str:
        path = tmp_path / "records.jsonl"
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
        return str(path)

    return to_file


def zsre(edits: EditSet, n_records: int) -> list[dict[str, Any]]:
    return [
        {
            "subject": edit.subject,
            "src": edit.prompt,
            "answers": [edit.target_true],
            "alt": edit.target_new,
            "loc": edit.locality[0].prompt,
            "loc_ans": edit.locality[0].answer,
        }
        for edit in edits[:n_records]
    ]


def test_the_form_and_its_target_are_told(write: Write, tiny_facts: EditSet) -> None:
    path = write(zsre(tiny_facts, 3))
    data, told = done("edit", MODEL, path, "--target-field", "alt", *QUICK)
    assert told.splitlines()[0] == "read 3 edits: form zsre, target = alt"
    assert (data["form"], data["target_field"], data["skipped"]) == ("zsre", "alt", [])
    assert data["evaluation"]["edited"]["efficacy_top1"]["value"] > 0.6
    # The true answers are what the model says already.
    data, told = done("eval", MODEL, path, "--fluency-prompts", "0")
    assert told.splitlines()[0] == "read 3 edits: form zsre, target = answers[0]"
    assert (data["target_field"], data["edited"]["efficacy_top1"]["value"]) == ("answers[0]", 1.0)


def test_skipped_records_are_told_and_counted(write: Write, tiny_facts: EditSet) -> None:
    good = zsre(tiny_facts, 3)
    far = {**good[2], "src": good[2]["src"] + " very" * 200, "case_id": "far"}
    bad = [{**good[0], "subject": "Nowhere", "case_id": number} for number in range(10, 31)]
    path = write([*good[:2], "{broken", *bad, far])
    refused = run("edit", MODEL, path, *QUICK)
    assert refused.exit_code == 2
    assert "and 2 more errors" in refused.stderr
    for command in ("edit", "eval"):
        data, told = done(command, MODEL, path, "--on-invalid", "skip", *(QUICK if command == "edit" else QUICK[-2:]))
        assert told.startswith("read 3 edits: form zsre, target = answers[0]\nskipped 22 records:\n")
        lines = told.splitlines()
        assert "records.jsonl:3: broken JSON" in lines[2]
        assert lines[22] == "... and 2 more errors"
        assert "skipped 1 record:" in lines
        assert "records.jsonl:25: case far, field 'prompt': must fit into the model's" in told
        assert len(data["skipped"]) == 23
        assert (data["skipped"][-1]["case_id"], data["skipped"][-1]["field"]) == ("far", "prompt")
        assert data["n_edits" if command == "edit" else "n_records"] == 2


def test_a_form_can_be_named(write: Write, tiny_facts: EditSet) -> None:
    path = write([{**record, "ans": "red"} for record in zsre(tiny_facts, 1)])
    ambiguous = run("edit", MODEL, path)
    assert ambiguous.exit_code == 2
    assert "could be of form zsre or zsre-ultraedit; say which with form" in ambiguous.stderr
    named = run("edit", MODEL, path, "--form", "zsre-ultraedit")
    assert named.exit_code == 2
    assert "field 'alt': is what form zsre edits towards, and unknown to form zsre-ultraedit" in named.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--form", "zsrre", "form must be one of auto, plain, "),
        ("--target-field", "pred", "target_field for form zsre must be one of answers[0], alt, got 'pred'"),
        ("--on-invalid", "drop", "'drop' is not one of 'refuse', 'skip'"),
    ],
)
@pytest.mark.parametrize("command", ["edit", "eval"])
def test_wrong_names_are_one_message_and_exit_code_2(
    write: Write, tiny_facts: EditSet, command: str, option: str, value: str, message: str
) -> None:
    result = run(command, MODEL, write(zsre(tiny_facts, 1)), option, value)
    assert result.exit_code == 2, result.output
    # The panel of a usage error wraps its lines.
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_groups_are_carried_through_to_json(write: Write, tiny_facts: EditSet) -> None:
    fact = tiny_facts[0]
    record = {
        "prompt": fact.prompt,
        "subject": fact.subject,
        "target_new": fact.target_new,
        "portability": {"Reasoning": [{"prompt": fact.rephrase_prompts[0], "ground_truth": [[fact.target_new]]}]},
        "locality": {"Forgetfulness": [{"prompt": fact.locality[0].prompt, "ground_truth": fact.locality[0].answer}]},
    }
    data, told = done("edit", MODEL, write([record]), *QUICK)
    assert told.startswith("read 1 edit: form knowedit, target = target_new\n")
    edited = data["evaluation"]["edited"]
    assert edited["portability/Reasoning"]["value"] == edited["portability"]["value"] == 1.0
    assert edited["tokens_unchanged/Forgetfulness"]["value"] is not None
    table = run("eval", MODEL, write([record]), "--fluency-prompts", "0")
    assert any(line.startswith("portability ") for line in table.stdout.splitlines())
