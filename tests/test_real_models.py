"""Every method, out of the box, on real models: the default one, and a Gemma and a Qwen where they are named.

    FASTEDIT_TEST_GEMMA=gemma.gguf FASTEDIT_TEST_QWEN=qwen.gguf make test-slow

Both take what `load_model` takes: a hub id, a folder, a GGUF file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastedit.cli.main import app
from fastedit.editor import Editor
from fastedit.methods.meg import MeG
from fastedit.methods.registry import METHODS
from fastedit.model.adapter import ModelAdapter
from fastedit.model.load import ModelNotFound, load_model
from fastedit.records.shipped import shipped_facts

NAMED = {"gemma": "FASTEDIT_TEST_GEMMA", "qwen": "FASTEDIT_TEST_QWEN"}
N_FACTS = 10
LEAST_TAKEN = {"nse": 9, "memit": 9, "alphaedit": 8, "fine": 9, "kne": 8}

pytestmark = pytest.mark.slow


def source_of(name: str) -> str:
    """Where the model is. Skips where it is not named."""
    if name not in NAMED:
        return name

    source = os.environ.get(NAMED[name])
    if not source:
        pytest.skip(f"{NAMED[name]} names no model")
    return source


@pytest.fixture(scope="module", params=["smollm2-135m", *NAMED])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelAdapter:
    """A real model; every test leaves it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        # One for all tests: the second moments are those of one model.
        patch.setenv("FASTEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        try:
            return load_model(source_of(request.param))
        except ModelNotFound as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("method", list(LEAST_TAKEN))
def test_a_method_edits_it_out_of_the_box(
    model: ModelAdapter, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "moments"))
    config: dict[str, Any] = {"moments": {"tokens": 20_000}} if METHODS[method].uses_second_moments else {}
    editor = Editor(model, method, config, progress=False)
    before = editor.weights.fingerprint()

    taken = 0
    facts = shipped_facts(N_FACTS)
    for start in range(0, N_FACTS, editor.method.batch_size):
        # As each method is meant: those that write single columns, one by one on the unedited model.
        with editor.temporarily(facts[start : start + editor.method.batch_size]) as run:
            taken += run.taken or 0

    assert taken >= LEAST_TAKEN[method]
    assert editor.weights.fingerprint() == before
    if editor.settings.origin == "derived":
        assert editor.calibration is not None
        assert not editor.calibration.failed


def test_meg_edits_it_out_of_the_box(model: ModelAdapter) -> None:
    meg = MeG(model, "meg-lookup", progress=False)
    run = meg.edit(shipped_facts(N_FACTS))
    assert len(run.failed) <= 1


@pytest.mark.parametrize("name", list(NAMED))
def test_one_command_with_nothing_else_edits_it(name: str, tmp_path: Path) -> None:
    source = source_of(name)
    path = tmp_path / "facts.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": e.prompt, "subject": e.subject, "target_new": e.target_new}) + "\n"
            for e in shipped_facts(N_FACTS)
        ),
        encoding="utf-8",
    )
    done = CliRunner().invoke(app, ["edit", source, str(path), "--no-eval", "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["settings"]["origin"] == "derived"
    assert data["settings"]["calibration"]["unchecked"] is None
    assert data["taken"] >= LEAST_TAKEN["nse"]
