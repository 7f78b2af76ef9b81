"""--family FILE: a model of no known family by the command line, from its refusal to a run that goes on without it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from fastedit.cli.main import app
from fastedit.editor import Editor
from fastedit.model.attention_modules import attend_by_interface
from fastedit.model.family_file import read_family
from fastedit.model.load import load_model
from fastedit.records.load import load_edits
from fastedit.runs.identity import identity
from fastedit.runs.log import RunError
from fastedit.runs.recorder import Recorder
from fastedit.weights.editable import ColumnWeights

FACTS = str(Path(__file__).resolve().parents[1] / "tiny" / "facts.jsonl")
FINE = ("--method", "fine", "--set", "frozen_layers=1", "--set", "train.steps=2", "--limit", "2", "--batch-size", "1")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def unknown(tmp_path: Path, random_tokenizer: Any) -> Path:
    """The folder of a model that no row ships for."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    config = transformers.BioGptConfig(
        **sizes, **ids, intermediate_size=48, max_position_embeddings=256, initializer_range=0.2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        transformers.BioGptForCausalLM(config).save_pretrained(tmp_path / "model")
    random_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def family(unknown: Path, tmp_path: Path) -> Path:
    """The row that the refusal of the model suggests, in a file."""
    refused = run("locate", unknown, "--prompt", "The twin of Tavisk is", "--target", "Pell")
    assert refused.exit_code == 2
    assert "BioGptForCausalLM: no known family fits" in refused.stderr
    start = refused.stderr.partition("like: ")
    row = (start[1] + start[2]).partition("\nThe fields")[0]
    (tmp_path / "family.yaml").write_text(row, encoding="utf-8")
    return tmp_path / "family.yaml"


def test_every_command_that_loads_a_model_takes_it(unknown: Path, family: Path) -> None:
    common = (unknown, "--family", family)
    done = run(
        "locate", *common, "--prompt", "The twin of Tavisk is", "--target", "Pell", "--frozen-layers", "1", "--json"
    )
    assert done.exit_code == 0, done.stderr
    done = run("stats", *common, "--layers", "1", "--moments", FACTS, "--moment-tokens", "400", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["trace"]["1"] > 0
    done = run("eval", unknown, FACTS, "--family", family, "--limit", "2", "--fluency-prompts", "0", "--json")
    assert done.exit_code == 0, done.stderr
    done = run("demo", "--model", unknown, "--family", family, "--n-edits", "2", "--json")
    assert done.exit_code == 0, done.stderr


def test_a_run_goes_on_without_it(unknown: Path, family: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    edit = ("edit", unknown, FACTS, *FINE, "--no-eval", "--run-dir", run_dir)
    done = run(*edit, "--family", family)
    assert done.exit_code == 0, done.stderr
    assert Recorder.open(run_dir).families == (read_family(family),)

    for command in (
        (*edit, "--limit", "3", "--resume"),
        ("replay", run_dir, "--save", tmp_path / "edited"),
        ("export", run_dir, tmp_path / "delta", "--format", "delta"),
        ("export", run_dir, tmp_path / "other", "--format", "delta", "--onto", unknown),
    ):
        done = run(*command)
        assert done.exit_code == 0, (command, done.stderr)

    editor = Editor.resume(run_dir)
    assert len(editor.edits) == 3
    assert editor.adapter.family == read_family(family)


def test_a_run_with_a_function_of_ones_own_asks_for_the_model(unknown: Path, family: Path, tmp_path: Path) -> None:
    def attend(*given: Any) -> torch.Tensor:
        return attend_by_interface(*given)

    # The interface is replaced for functions of ours alone, so that this row serves the header, and no pass.
    adapter = load_model(unknown, families=(read_family(family),))
    adapter.family = replace(adapter.family, attend=attend)
    weights = ColumnWeights(adapter, (0, 1))
    header = {"model": identity(adapter, weights)}
    assert header["model"]["family"] == {"name": "biogpt"}
    recorder = Recorder.create(tmp_path / "run", header)
    with pytest.raises(
        RunError, match="its family, 'biogpt', has a function of your own; load the model with families="
    ):
        recorder.load_model()


def test_a_run_of_a_shipped_row_says_nothing_of_it(fast_editor: Any, tmp_path: Path) -> None:
    editor = fast_editor()
    editor.edit(load_edits(FACTS)[:1], run_dir=tmp_path / "run")
    assert "family" not in Recorder.open(tmp_path / "run").header["model"]


def test_a_wrong_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "family.yaml"
    path.write_text("like: llama\ngates: mlp.up\n", encoding="utf-8")
    for command in (("edit", "nowhere", "nothing.jsonl"), ("eval", "nowhere", "nothing.jsonl"), ("stats", "nowhere")):
        done = run(*command, "--family", path)
        assert done.exit_code == 2
        assert done.stderr == f"error: {path}: 'gates' is unknown; did you mean 'gate'?\n"
    done = run("demo", "--family", tmp_path / "none.yaml")
    assert done.exit_code == 2
    assert "none.yaml: No such file or directory" in done.stderr
