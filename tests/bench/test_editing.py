"""The editing benchmark's random mode: what it makes, and one run of it at a small shape."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from fastedit.methods.closed_form.config import TemplateConfig
from fastedit.methods.closed_form.templates import sample_templates
from fastedit.records.check import check_edits

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 3200,
}


@pytest.fixture(scope="module")
def bench():
    """Imports modules of bench/ by name; "llama-small" is smaller still."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        patch.setitem(importlib.import_module("random_model").SHAPES, "llama-small", SHAPE)
        yield importlib.import_module


@pytest.fixture(scope="module")
def model(bench):
    return bench("random_model").random_model("llama-small", torch.float32, "cpu")


def test_records_are_accepted_and_as_long_as_real_ones(bench, model):
    edits = bench("random_model").records(100)
    assert edits == bench("random_model").records(100)
    checked, skipped = check_edits(
        edits,
        100,
        tokenizer=model.tokenizer,
        max_positions=model.max_positions,
        template_tokens=11,
        on_invalid="refuse",
    )
    assert [len(batch) for batch in checked] == [100]
    assert skipped == ()
    lengths = [len(ids) for ids in model.tokenizer([edit.prompt for edit in edits])["input_ids"]]
    assert 8 <= sum(lengths) / len(lengths) <= 16


def test_every_token_of_the_model_that_is_sampled_is_one_of_the_tokenizer(model):
    model.check_forward()
    known = len(model.tokenizer)
    assert known < SHAPE["vocab_size"]
    made = model.generate(torch.randint(1, known, (16, 4)), 8, top_k=5)
    assert int(made.max()) < known
    assert len(set(sample_templates(model, TemplateConfig(), 0))) == 6


def test_second_moments_are_of_full_rank(bench, model):
    moments = bench("random_model").random_moments(model, (4, 5))
    assert list(moments) == [4, 5]
    for moment in moments.values():
        eigenvalues = torch.linalg.eigvalsh(moment.double())
        assert float(eigenvalues[0]) > 1e-6 * float(eigenvalues[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_random_model_is_timed_and_held_against_the_published_procedure(bench, monkeypatch, tmp_path, capsys, dtype):
    monkeypatch.setattr(bench("timing"), "RESULTS", tmp_path)
    editing = bench("editing")
    arguments = ["--random", "llama-small", "--edits", "6", "--baseline-edits", "2", "--repeats", "1", "--threads", "1"]
    editing.main([*arguments, "--dtype", dtype, "--set", "value.steps=4"])
    printed = capsys.readouterr().out
    assert "written (6, 6)" in printed
    assert "ratio:" in printed
    (path,) = tmp_path.iterdir()
    rows = bench("timing").read_rows(path)
    shape = "llama-small random weights nse B=6 steps=4"
    assert [(row["backend"], row["dtype"], row["shape"]) for row in rows] == [
        ("published", dtype, shape),
        ("engine", dtype, shape),
    ]
    assert float(rows[0]["median"]) > float(rows[1]["median"]) > 0


def test_no_ratio_is_printed_when_the_engine_gives_something_else(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench("timing"), "RESULTS", tmp_path)
    editing = bench("editing")
    settings_of = editing.settings_of
    # The baseline takes larger steps than the engine.
    monkeypatch.setattr(
        editing, "settings_of", lambda config: settings_of(editing.changed(config, {"value": {"lr": 1}}))
    )
    arguments = ["--random", "llama-small", "--edits", "3", "--baseline-edits", "2", "--repeats", "1", "--threads", "1"]
    with pytest.raises(SystemExit, match="no ratio, results disagree"):
        editing.main([*arguments, "--set", "value.steps=4"])
    assert "ratio" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
