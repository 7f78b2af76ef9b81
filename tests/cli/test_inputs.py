"""What commands are given is judged before a model is read: settings, devices, texts; and what `--join` sets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from fastedit.cli.console import open_console
from fastedit.cli.inputs import Reading, config_class, read_records
from fastedit.cli.main import app
from fastedit.editor import Editor
from fastedit.methods.registry import METHODS

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "tiny"
MODEL, FACTS, TEXT = str(TINY / "model"), str(TINY / "facts.jsonl"), str(TINY / "text.txt")
OWN = "model: {n_layers: 8, d_model: 64, d_ff: 192}\nconfig: {layers: 2-4, covariance_weight: 100, value: {steps: 5}}\n"
GONE = "/no/such/model"
QUICK = ("--limit", "2", "--moments", TEXT, "--moment-tokens", "2048", "--no-eval")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.yaml").write_text(OWN, encoding="utf-8")
    return str(tmp_path / "own.yaml")


def test_the_quick_classes_are_those_of_the_methods() -> None:
    for name, method in METHODS.items():
        assert config_class(name) is method.config_class
    assert config_class("meg") is None


def test_a_mistyped_setting_is_told_before_torch_is_imported() -> None:
    """Which is most of what the command takes to start: 0.4 s instead of 2 s."""
    arguments = ["edit", GONE, FACTS, "--set", "rouds=2", "--set", "value.lr=fast"]
    code = "import sys; from fastedit.cli.main import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines() == [
        "error: value.lr must be a number, above 0, got 'fast'",
        "unknown setting rouds; did you mean rounds?",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("edit", GONE, FACTS, "--preset", "smollm-135m"), "no preset 'smollm-135m'; there are"),
        (("edit", GONE, FACTS, "--preset", "no.yaml"), "no.yaml: No such file or directory"),
        (("edit", GONE, FACTS, "--set", "rounds=!x 2"), "rounds='!x 2' holds a tag"),
        (("edit", GONE, FACTS, "--method", "meg", "--set", "fit.layr=2"), "unknown setting fit.layr; did you mean"),
        (
            ("edit", GONE, FACTS, "--method", "kne", "--set", "key_layers=x"),
            "key_layers must be a whole number or",
        ),
        (
            ("edit", GONE, FACTS, "--device", "tpu"),
            "--device must be cpu, cuda, cuda:1 (or another number)",
        ),
        (("edit", GONE, FACTS, "--device", "cuda:99"), "--device: cuda:99 is not here; there is cpu"),
        (("edit", GONE, FACTS, "--moments", GONE), f"{GONE}: No such file or directory"),
        (("edit", GONE, FACTS, "--text", MODEL), f"{MODEL}: Is a directory"),
        (("edit", GONE, FACTS, "--max-growth", "0.5"), "guard: wanted max_growth > 1, got 0.5\n"),
        (("edit", GONE, FACTS, "--set", "value.lr=.inf"), "value.lr must be a finite number, above 0, got inf"),
        (("stats", GONE, "--layers", "8-4"), "--layers must be a list of layers (4-8 or 4,6,8), got '8-4'"),
        (("stats", GONE, "--set", "moments.tokns=3"), "unknown setting moments.tokns; did you mean moments.tokens?"),
        (("stats", GONE, "--method", "kn"), "kn uses no second moments"),
        (("eval", GONE, FACTS, "--device", ""), "--device must be cpu"),
        (("locate", GONE, "--prompt", "a", "--target", "b", "--device", "cuda:x"), "--device must be cpu"),
        (("demo", "--model", GONE, "--device", "gpu"), "--device must be cpu"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_read(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "no model" not in done.stderr
    assert "loading" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "the name of the model is empty; give a folder"),
        ((MODEL, "--set", "layers=2-40", "--set", "covariance_weight=9"), "below the last layer 7, got 2-40\n"),
    ],
    ids=["no name", "layers"],
)
def test_what_the_model_tells_is_one_short_sentence(arguments: tuple[str, ...], message: str) -> None:
    name, *others = arguments
    done = run("edit", name, FACTS, *QUICK, *others)
    assert done.exit_code == 2, done.output
    assert message in done.stderr


def test_a_preset_of_a_file_is_edited_with(own: str) -> None:
    done = run("edit", MODEL, FACTS, *QUICK, "--preset", own, "--set", "layers=3-4", "--json")
    assert done.exit_code == 0, done.output
    (report,) = json.loads(done.stdout)["batches"]
    assert list(report["neurons"]) == ["3", "4"]
    assert report["steps"] <= 4


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_every_command_that_loads_a_model_takes_a_device(device: str, own: str, tmp_path: Path) -> None:
    folder, asked = str(tmp_path / "run"), ("--device", device)
    for command in (
        ("edit", MODEL, FACTS, *QUICK, "--preset", own, "--run-dir", folder),
        ("eval", MODEL, FACTS, "--limit", "1", "--fluency-prompts", "0"),
        ("stats", MODEL, "--preset", own, "--moments", TEXT, "--moment-tokens", "2048"),
        ("locate", MODEL, "--prompt", "The main product of Kequunan is", "--target", "glass beads"),
        ("diff", folder),
        ("replay", folder, "--save", str(tmp_path / "replayed")),
        ("export", folder, str(tmp_path / "exported")),
        ("undo", folder, "--edit", json.loads(Path(FACTS).read_text().splitlines()[0])["case_id"]),
    ):
        done = run(*map(str, command), *asked)
        assert done.exit_code == 0, done.output

    refused = run("undo", folder, "--last", "1", *asked)
    assert refused.exit_code == 2
    assert "--device: only undo --edit loads the model" in refused.stderr


@pytest.mark.gpu
def test_an_edit_on_a_gpu(own: str, tmp_path: Path) -> None:
    done = run("edit", MODEL, FACTS, *QUICK, "--preset", own, "--device", "cuda:0", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["written"] == 2
    assert torch.cuda.max_memory_allocated() > 0


def test_join_is_for_records_that_name_none(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records = [{"prompt": "{} is in", "subject": "Pell", "target_new": "Tavisk"} for _ in range(2)]
    records[1]["join"] = "-"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")

    def joins(join: str | None) -> list[str | None]:
        return [edit.join for edit in read_records(open_console(), path, Reading(join=join))]

    assert joins("") == ["", "-"]
    assert joins("::") == ["::", "-"]
    assert joins("auto") == joins(None) == [None, "-"]


def test_join_is_what_is_written_and_measured(own: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run("edit", MODEL, FACTS, *QUICK, "--preset", own, "--join", ": ", "--run-dir", str(folder))
    assert done.exit_code == 0, done.output
    assert [edit.join for edit in Editor.resume(folder).edits] == [": ", ": "]

    measured = [
        run("eval", MODEL, FACTS, "--limit", "8", "--fluency-prompts", "0", "--json", "--join", join).stdout
        for join in ("auto", " ", "??")
    ]
    assert measured[0] == measured[1] != measured[2]


def test_stats_of_a_model_without_a_preset() -> None:
    asked = ("stats", MODEL, "--moments", TEXT, "--moment-tokens", "2048")
    done = run(*asked, "--layers", "2,4", "--json")
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)["trace"]) == ["2", "4"]

    derived = run(*asked, "--json")
    assert derived.exit_code == 0, derived.output
    assert list(json.loads(derived.stdout)["trace"]) == ["0", "1", "2"]
    assert run(*asked, "--layers", "2,99").exit_code == 2
