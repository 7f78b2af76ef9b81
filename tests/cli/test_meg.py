"""MeG from the command line: a run that can be continued, a store that eval measures, and refused options."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastedit.cli.console import refuse
from fastedit.cli.edit import edit as edit_command
from fastedit.cli.main import app
from fastedit.cli.measure import evaluate_command
from fastedit.cli.meg import ONLY_FOR_MEG, UNUSED_BY_EDIT, UNUSED_BY_EVAL

TINY = Path(__file__).resolve().parents[1] / "tiny"
MODEL, FACTS = str(TINY / "model"), str(TINY / "facts.jsonl")
SMALL = (
    "fit.layer=4",
    "fit.stop_token=false",
    "fit.template='{}'",
    "encoder.layer=3",
    "encoder.epochs=1",
    "gate.epochs=60",
    "generator.width=32",
)
QUICK = ("generator.patch=32", "generator.heads=4", "generator.blocks=1", "generator.epochs=10", "max_new_tokens=6")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def settings() -> list[str]:
    return [part for setting in (*SMALL, *QUICK) for part in ("--set", setting)]


@pytest.mark.parametrize("method", ["meg", "meg-lookup"])
def test_edit_saves_a_store_that_eval_measures(tmp_path: Path, method: str) -> None:
    saved, folder = tmp_path / "edits.safetensors", tmp_path / "run"
    arguments = ("edit", MODEL, FACTS, "--method", method, "--limit", "8", "--others", FACTS, "--work-dir", str(folder))
    done = run(*arguments, "--save", str(saved), "--json", *settings())
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["n_edits"] == 8
    assert set(data["seconds"]) == {"encoder", "vectors", "neurons", "gate", "generator"}
    assert data["evaluation"]["unedited"]["locality_free"] == 100
    assert (folder / "meg.safetensors").is_file()
    again = run("eval", MODEL, FACTS, "--limit", "8", "--meg", str(saved), "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["edited"] == data["evaluation"]["edited"]
    text = run(*arguments, "--save", str(saved), "--force", *settings())
    assert "reliability_free" in text.stdout
    assert "inside the gate" in text.stdout
    assert f"saved to {saved}" in text.stdout


def test_wrong_input_is_one_message(tmp_path: Path) -> None:
    done = run("edit", MODEL, FACTS, "--method", "meg", "--limit", "4", "--set", "fit.layer=9", "--no-eval")
    assert done.exit_code == 2
    assert "fit.layer must lie in 0-7, got 9" in done.stderr
    done = run("edit", MODEL, FACTS, "--method", "meg", "--limit", "4", "--set", "fit.size=9")
    assert done.exit_code == 2
    assert "fit.size" in done.stderr
    (tmp_path / "wrong.safetensors").write_text("no")
    done = run("eval", MODEL, FACTS, "--meg", str(tmp_path / "wrong.safetensors"))
    assert done.exit_code == 2
    assert "cannot be read as safetensors" in done.stderr


@pytest.mark.parametrize(
    ("command", "unused"),
    [(edit_command, UNUSED_BY_EDIT), (edit_command, ONLY_FOR_MEG), (evaluate_command, UNUSED_BY_EVAL)],
)
def test_unused_options_are_options_of_their_command(command: Callable[..., None], unused: dict[str, str]) -> None:
    assert unused.keys() <= inspect.signature(command).parameters.keys()
    for name, sentence in unused.items():
        assert sentence.startswith(f"--{name.replace('_', '-')}: ")


def test_unused_options_are_refused_with_a_sentence_each() -> None:
    refuse(["method", "settings", "others", "work_dir", "seed"], UNUSED_BY_EDIT)
    refuse([], UNUSED_BY_EDIT)
    with pytest.raises(ValueError, match=r"^--watch: meg learns all edits together") as wrong:
        refuse(["method", "max_growth", "watch"], UNUSED_BY_EDIT)
    assert str(wrong.value).splitlines() == [UNUSED_BY_EDIT["watch"], UNUSED_BY_EDIT["max_growth"]]


VALUES = {
    "preset": "smollm2-135m",
    "batch_size": "2",
    "join": "auto",
    "moments": FACTS,
    "moment_tokens": "9",
    "on_error": "skip",
    "text": FACTS,
    "fluency_prompts": "1",
    "watch": "1",
    "run_dir": "run",
    "canaries": "1",
    "save_format": "lora",
    "save_dtype": "float16",
    "max_growth": "2",
    "unedited": MODEL,
    "seed": "1",
}


def option(name: str) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if name == "calibrate":
        return ["--no-calibrate"]
    return [flag] if name == "resume" else [flag, VALUES[name]]


@pytest.mark.parametrize("name", UNUSED_BY_EDIT)
def test_edit_refuses_each_of_them(name: str) -> None:
    done = run("edit", MODEL, FACTS, "--method", "meg", "--limit", "4", *option(name))
    assert done.exit_code == 2, done.output
    assert UNUSED_BY_EDIT[name] in done.stderr


@pytest.mark.parametrize("name", UNUSED_BY_EVAL)
def test_eval_refuses_each_of_them(name: str) -> None:
    done = run("eval", MODEL, FACTS, "--meg", "store.safetensors", "--limit", "4", *option(name))
    assert done.exit_code == 2, done.output
    assert UNUSED_BY_EVAL[name] in done.stderr
