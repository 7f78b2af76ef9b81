"""The command line as users type it: exit codes, JSON, messages, and a model that can be loaded afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml
from typer.testing import CliRunner, Result

from fastedit.cli.edit import MEG_METHODS
from fastedit.cli.main import app
from fastedit.cli.options import Method
from fastedit.methods.registry import METHODS

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "tiny"
MODEL, FACTS, TEXT = str(TINY / "model"), str(TINY / "facts.jsonl"), str(TINY / "text.txt")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def tiny_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets as a user with the tiny model would have them."""
    preset = {
        "model": {"n_layers": 8, "d_model": 64, "d_ff": 192},
        "config": {
            "layers": [2, 3, 4],
            "covariance_weight": 100,
            "value": {"steps": 20, "lr": 0.1},
            "moments": {"tokens": 4096, "window": 64},
        },
    }
    config = json.loads((TINY / "model" / "config.json").read_text(encoding="utf-8"))
    preset["model"] = {
        "n_layers": config["num_hidden_layers"],
        "d_model": config["hidden_size"],
        "d_ff": config["intermediate_size"],
    }
    folder = tmp_path / "presets"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(preset), encoding="utf-8")
    monkeypatch.setitem(METHODS, "nse", replace(METHODS["nse"], presets=tmp_path / "presets"))


@pytest.mark.usefixtures("tiny_preset")
def test_edit_saves_a_model_that_eval_measures(tmp_path: Path) -> None:
    saved = str(tmp_path / "edited")
    done = run(
        "edit", MODEL, FACTS, "--limit", "8", "--batch-size", "4", "--moments", TEXT, "--text", TEXT,
        "--fluency-prompts", "2", "--save", saved, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["n_edits"] == 8
    assert len(data["batches"]) == 2
    assert data["evaluation"]["edited"]["efficacy_top1"]["value"] >= 0.75
    again = run("eval", saved, FACTS, "--unedited", MODEL, "--limit", "8", "--fluency-prompts", "0", "--json")
    assert again.exit_code == 0, again.output
    measured = json.loads(again.stdout)
    assert measured["edited"]["efficacy_top1"] == data["evaluation"]["edited"]["efficacy_top1"]
    assert measured["unedited"]["efficacy_top1"] == data["evaluation"]["unedited"]["efficacy_top1"]


@pytest.mark.usefixtures("tiny_preset")
def test_table_names_every_metric() -> None:
    done = run("edit", MODEL, FACTS, "--limit", "2", "--moments", TEXT, "--fluency-prompts", "0")
    assert done.exit_code == 0, done.output
    for name in ("efficacy", "generalization", "specificity", "score", "tokens_unchanged", "unedited", "s per edit"):
        assert name in done.stdout


@pytest.mark.usefixtures("tiny_preset")
def test_stats_are_computed_once() -> None:
    arguments = ("stats", MODEL, "--layers", "2-3", "--moments", TEXT, "--json")
    first, second = run(*arguments), run(*arguments)
    assert first.exit_code == second.exit_code == 0, first.output
    assert json.loads(first.stdout)["trace"] == json.loads(second.stdout)["trace"]
    assert list(json.loads(first.stdout)["trace"]) == ["2", "3"]


@pytest.mark.usefixtures("tiny_preset")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("edit", MODEL, "missing.jsonl"), "missing.jsonl"),
        (("edit", "/no/such/model", FACTS), "/no/such/model"),
        (("edit", MODEL, FACTS, "--method", "magic"), "nse"),
        (("edit", MODEL, FACTS, "--preset", "llama-99b"), "llama-99b"),
        (("edit", MODEL, FACTS, "--moments", FACTS + ".nowhere"), "nowhere"),
        (("stats", MODEL, "--layers", "4-x"), "--layers"),
        (("stats", MODEL, "--layers", "2,99"), "--layers"),
    ],
    ids=["no file", "no model", "no method", "no preset", "no text", "layers not numbers", "layers beyond the model"],
)
def test_wrong_input_is_one_message_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.usefixtures("tiny_preset")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "kne", "--moments", TEXT), "--moments: kne reads no background text"),
        (("--method", "kn", "--moment-tokens", "100"), "--moment-tokens: kn reads no background text"),
        (("--work-dir", "kept"), "--work-dir: only meg and meg-lookup have stages to keep"),
        (("--others", FACTS), "--others: only meg and meg-lookup learn from records that are not edited"),
    ],
    ids=["text", "tokens", "work dir", "others"],
)
def test_a_flag_that_the_method_does_not_use_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = run("edit", MODEL, FACTS, "--limit", "1", *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr


def test_text_is_refused_where_the_settings_leave_it_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = "model: {n_layers: 8, d_model: 64, d_ff: 192}\nconfig: {frozen_layers: 1, train: {steps: 2}}\n"
    (tmp_path / "tiny.yaml").write_text(shape, encoding="utf-8")
    monkeypatch.setitem(METHODS, "fine", replace(METHODS["fine"], presets=tmp_path))
    asked = (
        "edit",
        MODEL,
        FACTS,
        "--limit",
        "1",
        "--method",
        "fine",
        "--preset",
        "tiny",
        "--no-eval",
        "--moments",
        TEXT,
    )

    refused = run(*asked)
    assert refused.exit_code == 2
    assert "--moments: fine reads no background text with these settings" in refused.stderr

    read = run(*asked, "--set", "common_share=0.5", "--moment-tokens", "256")
    assert read.exit_code == 0, read.output


@pytest.mark.usefixtures("tiny_preset")
def test_nothing_written_is_told_and_fails() -> None:
    done = run(
        "edit", MODEL, FACTS, "--limit", "12", "--moments", TEXT, "--no-eval", "--set", "residual_min=1e6", "--json"
    )
    assert done.exit_code == 1, done.output
    data = json.loads(done.stdout)
    assert (data["n_edits"], data["written"], data["taken"], len(data["missed"])) == (12, 0, 0, 12)
    assert "0 of 12 edits were written" in done.stderr
    assert "12 edits did not take" in done.stderr
    assert "and 2 more, in --json and in the run directory" in done.stderr
    assert done.stderr.count("(nothing was written for it)") == 10


@pytest.mark.usefixtures("tiny_preset")
def test_edits_that_did_not_take_warn() -> None:
    done = run("edit", MODEL, FACTS, "--limit", "2", "--moments", TEXT, "--no-eval", "--set", "value.steps=2")
    assert done.exit_code == 0, done.output
    assert "2 written" in done.stdout
    assert "did not take" in done.stderr
    assert "wanted" in done.stderr


def test_a_preset_of_another_shape_warns(caplog: pytest.LogCaptureFixture) -> None:
    run("edit", MODEL, FACTS, "--limit", "1", "--preset", "smollm2-135m", "--set", "layers=[2,3]", "--no-eval")
    assert "preset smollm2-135m was made for another model: n_layers 30, not 8, d_model 576, not 64" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--no-eval", "--text", TEXT), "--text: with --no-eval and without --watch no perplexity is measured"),
        (("--no-eval", "--fluency-prompts", "3"), "--fluency-prompts: with --no-eval no fluency is measured"),
    ],
)
def test_what_only_the_evaluation_uses_is_refused_without_it(arguments: tuple[str, ...], message: str) -> None:
    done = run("edit", MODEL, FACTS, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_the_methods_of_the_option_are_those_that_exist() -> None:
    choices, *_ = get_args(Method)
    assert set(get_args(choices)) == {*METHODS, *MEG_METHODS}


def test_bad_records_are_all_listed(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    records = [
        {"prompt": "The flag of Zorun is", "subject": "Zorun", "target_new": " "},
        {"prompt": "The flag of Zorun is", "subject": "Paris", "target_new": "red"},
    ]
    path.write_text("\n".join(map(json.dumps, records)) + "\n{broken", encoding="utf-8")
    done = run("edit", MODEL, str(path))
    assert done.exit_code == 2
    for line in ("bad.jsonl:1", "bad.jsonl:2", "bad.jsonl:3"):
        assert line in done.stderr


def test_locate_prints_a_table_and_json(tmp_path: Path) -> None:
    asked = (
        "locate",
        MODEL,
        "--prompt",
        "The main product of Kequunan is",
        "--target",
        "glass beads",
        "--neurons",
        "2",
    )
    done = run(*asked, "--json", "--plot", str(tmp_path / "map.png"))
    assert done.exit_code == 0, done.output
    neurons = json.loads(done.stdout)["neurons"]
    assert len(neurons) >= 4
    assert (tmp_path / "map.png").stat().st_size > 1000
    table = run(*asked).stdout
    assert table.splitlines()[0].split() == ["target", "said", "now", "layer", "neuron", "score", "promotes"]
    assert run(*asked, "--frozen-layers", "8").exit_code == 2


def test_doctor_prints_ops_and_versions() -> None:
    done = run("doctor", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    files = (ROOT / "fastedit/ops").glob("*.py")
    assert set(data["ops"]) == {path.stem for path in files if not path.stem.startswith("_")} > {"capture_keys"}
    assert data["versions"]["torch"]


def test_doctor_fails_when_two_distributions_own_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.metadata.packages_distributions", lambda: {"fastedit": ["fastedit-engine", "pyfastedit"]}
    )
    done = run("doctor")
    assert done.exit_code == 1
    assert "pip uninstall pyfastedit" in done.stdout


def test_help_is_quick_and_needs_no_torch() -> None:
    code = "import sys; from fastedit.cli.main import main; sys.argv = ['fastedit', '--help']\ntry: main()\n"
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "edit" in done.stdout


@pytest.mark.usefixtures("tiny_preset")
def test_a_watched_stream_of_another_method_with_settings() -> None:
    done = run(
        "edit", MODEL, FACTS, "--limit", "6", "--batch-size", "3", "--moments", TEXT, "--no-eval", "--watch", "1",
        "--set", "value.steps=12", "--set", "rounds=1", "--dtype", "bfloat16", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert [point["n_edits"] for point in data["curve"]] == [0, 3, 6]
    assert all(batch["steps"] <= 11 and len(batch["written"]) == 1 for batch in data["batches"])


@pytest.mark.usefixtures("tiny_preset")
@pytest.mark.parametrize(("setting", "named"), [("steps=3", "steps"), ("value.lr=fast", "lr"), ("rounds", "rounds")])
def test_a_wrong_setting_is_named(setting: str, named: str) -> None:
    done = run("edit", MODEL, FACTS, "--limit", "2", "--set", setting)
    assert done.exit_code == 2
    assert named in done.output


def test_an_unknown_dtype_is_refused() -> None:
    done = run("edit", MODEL, FACTS, "--dtype", "float33")
    assert done.exit_code == 2
    message = " ".join(done.output.replace("│", " ").split())
    assert "'float33' is not one of 'float32', 'bfloat16', 'float16'" in message
