"""Derived settings are tried on a few known facts before the first edit."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastedit.editing import calibration
from fastedit.editing.calibration import Calibration, CalibrationFailed, CheckedFact, calibrate, known_facts, table
from fastedit.editing.stream import Stream
from fastedit.editor import Editor
from fastedit.methods.closed_form import derived
from fastedit.methods.registry import METHODS
from fastedit.model.adapter import ModelAdapter
from fastedit.model.load import ModelNotFound
from fastedit.records.edit import EditSet
from fastedit.records.shipped import shipped_facts
from fastedit.runs.log import RunError, RunLog
from fastedit.runtime.cache import cache_folder
from fastedit.runtime.progress import Lines

SHORT = {"moments": {"tokens": 2048, "window": 64}}
N_KNOWN = 12


@pytest.fixture(scope="session")
def learned(tiny_parts: tuple[Any, Any]) -> ModelAdapter:
    """The tiny model after it was trained on a dozen of the shipped facts; never to be edited: take a copy."""
    tiny, tokenizer = tiny_parts
    model = copy.deepcopy(tiny).requires_grad_(True)
    texts = [f"{edit.prompt} {edit.target_true}" for edit in shipped_facts()[:N_KNOWN]]
    batches = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(12):
        for ids in batches:
            adam.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            adam.step()
    return ModelAdapter(model.requires_grad_(False), tokenizer)


@pytest.fixture
def knowing(learned: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> ModelAdapter:
    """A copy of it; fewer facts are tried, for time, and so small a model need not stay as whole as a real one."""
    monkeypatch.setattr(calibration, "LARGEST_PERPLEXITY", 3.0)
    monkeypatch.setattr(calibration, "LEAST_EFFICACY", 0.5)
    monkeypatch.setattr(calibration, "N_FACTS", 5)
    monkeypatch.setattr(calibration, "BATCH", 3)
    return ModelAdapter(copy.deepcopy(learned.model), learned.tokenizer)


def test_known_facts_are_tried_told_and_undone(knowing: ModelAdapter, tiny_facts: EditSet) -> None:
    told: list[str] = []
    config = {"train": {"lr": 0.02}}
    editor = Editor(knowing, "fine", config, progress=Lines(told.append))
    facts = known_facts(editor.stream)
    assert calibration.FEWEST_FACTS <= len(facts) <= calibration.N_FACTS
    before = editor.weights.fingerprint()
    state = copy.deepcopy(editor.state.tensors())

    found = editor.calibrate()
    assert editor.weights.fingerprint() == before
    assert editor.state.tensors().keys() == state.keys()
    assert len(editor.edits) == 0
    assert found.unchecked is None
    assert found.error is None
    assert [fact.prompt for fact in found.facts] == [edit.prompt for edit in facts[: len(found.facts)]]
    assert found.efficacy == sum(fact.took for fact in found.facts) / len(found.facts) >= 0.5
    for fact in found.facts:
        assert fact.took == (fact.says == fact.wanted)

    fresh = Editor(knowing, "fine", config, progress=Lines(told.append))
    fresh.edit(tiny_facts[:2])
    assert fresh.calibration == found
    assert f"fine: settings derived from the model, {found}" in told


def test_the_edits_are_those_without_a_check(knowing: ModelAdapter, learned: ModelAdapter, tiny_facts: EditSet) -> None:
    """Looking leaves no trace in what is written afterwards."""
    other = ModelAdapter(copy.deepcopy(learned.model), learned.tokenizer)
    prints = []
    for model, is_checked in ((knowing, True), (other, False)):
        editor = Editor(model, "memit", {**SHORT, "memory": True}, calibrate=False, progress=False)
        if is_checked:
            assert editor.calibrate().facts
        editor.edit(tiny_facts[:4], batch_size=2, verify=False)
        prints.append(editor.weights.fingerprint())
    assert prints[0] == prints[1]


def test_a_check_is_one_of_the_unedited_model(knowing: ModelAdapter, tiny_facts: EditSet) -> None:
    """Its result is kept under the unedited model's name."""
    editor = Editor(knowing, "memit", SHORT, calibrate=False, progress=False)
    editor.edit(tiny_facts[:2], verify=False)
    with pytest.raises(ValueError, match=r"wanted the unedited model, but 1 batch is in force"):
        editor.calibrate()
    editor.undo()
    assert editor.calibrate().facts


def test_settings_that_fail_are_an_error_with_the_table(
    knowing: ModelAdapter, tiny_facts: EditSet, tmp_path: Path
) -> None:
    weak = {"train": {"lr": 1e-9}}
    editor = Editor(knowing, "fine", weak, progress=False)
    before = editor.weights.fingerprint()
    for _ in range(2):
        # Again, from the cache, for the same settings.
        with pytest.raises(CalibrationFailed, match=r"efficacy 0\.\d+") as failed:
            editor.edit(tiny_facts[:2], run_dir=tmp_path / "run")
    message = str(failed.value)
    assert message.startswith("fine: settings derived from the model, checked on ")
    assert "': was '" in message
    assert "--no-calibrate" in message
    assert editor.weights.fingerprint() == before
    assert not (tmp_path / "run").exists()

    passed = Editor(knowing, "fine", weak, calibrate=False, progress=False)
    passed.edit(tiny_facts[:2])
    assert passed.calibration is None


def test_the_result_is_kept_by_content(knowing: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Editor(knowing, "fine", progress=False).calibrate()
    files = list((cache_folder() / "calibrations").iterdir())
    assert [path.suffix for path in files] == [".json"]

    monkeypatch.setattr("fastedit.editing.calibration._check", None)
    assert Editor(knowing, "fine", progress=False).calibrate() == first
    # Other settings, another seed, another model: nothing is known of them.
    for changed in ({"config": {"neurons": 3}}, {"seed": 1}):
        with pytest.raises(TypeError, match="not callable"):
            Editor(knowing, "fine", progress=False, **changed).calibrate()  # type: ignore[arg-type]
    knowing.down_parameter(0).data[0, 0] += 1
    with pytest.raises(TypeError, match="not callable"):
        Editor(knowing, "fine", progress=False).calibrate()


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "another"}', '{"format": "fastedit calibration 1"}'])
def test_a_damaged_result_is_told_and_made_again(
    knowing: ModelAdapter, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = Editor(knowing, "memit", SHORT, progress=False).calibrate()
    (path,) = (cache_folder() / "calibrations").iterdir()
    path.write_text(content, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        again = Editor(knowing, "memit", SHORT, progress=False).calibrate()
    assert "it is made again" in caplog.text
    assert again.facts == first.facts
    assert json.loads(path.read_text(encoding="utf-8"))["format"] == calibration.FORMAT


def test_a_model_that_knows_too_little_is_unchecked(
    tiny_model: ModelAdapter, tiny_facts: EditSet, caplog: pytest.LogCaptureFixture
) -> None:
    editor = Editor(tiny_model, "fine", progress=False)
    with caplog.at_level(logging.WARNING):
        editor.edit(tiny_facts[:2])
    assert editor.calibration is not None
    assert editor.calibration.unchecked == "the model surely knows 0 shipped facts, and 4 are needed"
    assert "fine: settings derived from the model, unchecked" in caplog.text
    assert len(editor.edits) == 2


def test_too_long_is_unchecked_and_leaves_nothing(knowing: ModelAdapter) -> None:
    editor = Editor(knowing, "fine", progress=False)
    before = editor.weights.fingerprint()
    found = calibrate(editor.stream, time_limit_s=0.0)
    assert found.unchecked == "it takes more than 0 s on this machine"
    assert not found.failed
    assert editor.weights.fingerprint() == before


def test_little_time_is_enough_for_the_first_batch(knowing: ModelAdapter) -> None:
    """The time is over in the middle of the second batch, which is rolled back."""
    editor = Editor(knowing, "memit", SHORT, progress=False)
    _ = editor.state
    before = editor.weights.fingerprint()
    write, begun = Stream.write_batch, []

    with pytest.MonkeyPatch.context() as patch:

        def late(self: Stream, number: int, batch: EditSet, *others: Any) -> Any:
            begun.append(len(batch))
            patch.setattr(calibration.time, "monotonic", lambda: 1e12 if len(begun) > 1 else 0.0)
            return write(self, number, batch, *others)

        patch.setattr(Stream, "write_batch", late)
        found = editor.calibrate()
    assert begun == [3, 2]
    assert len(found.facts) == 3
    assert found.unchecked is None
    assert editor.weights.fingerprint() == before


@pytest.mark.parametrize(
    ("perplexity", "took", "error", "failed"),
    [
        (1.0, 10, None, False),
        (1.25, 7, None, False),
        (1.26, 10, None, True),
        (float("nan"), 10, None, True),
        (1.0, 6, None, True),
        (None, 0, "not written", True),
    ],
)
def test_what_fails(perplexity: float | None, took: int, error: str | None, failed: bool) -> None:
    facts = tuple(CheckedFact("p", "a", "b", "b", at < took, False, 1.0) for at in range(10))
    found = Calibration(facts, perplexity, 1.0, None, error)
    assert found.failed == failed
    assert len(table(found).splitlines()) == 11


def test_a_preset_or_whole_settings_are_not_tried(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastedit.editing.calibration.calibrate", None)
    editor = tiny_editor()
    assert editor.settings.origin == "given"
    editor.edit(tiny_facts[:2])
    assert editor.calibration is None


def test_a_recorded_run_goes_on_with_derived_settings(
    knowing: ModelAdapter, learned: ModelAdapter, tiny_facts: EditSet, tmp_path: Path
) -> None:
    """A second process derives the same settings, and finds the check in the cache."""
    config = {**SHORT}
    first = Editor(knowing, "memit", config, calibrate=False, progress=False)
    first.calibrate()
    first.edit(tiny_facts[:2], batch_size=1, run_dir=tmp_path / "run")
    second = Editor(ModelAdapter(copy.deepcopy(learned.model), learned.tokenizer), "memit", config, progress=False)
    second._calibrates = False
    second.edit(tiny_facts[:4], batch_size=1, run_dir=tmp_path / "run", resume=True)
    assert len(second.edits) == 4
    assert len(list(RunLog(tmp_path / "run").records)) >= 4
    second.undo(to=0)
    assert (
        second.weights.fingerprint()
        == Editor(
            ModelAdapter(copy.deepcopy(learned.model), learned.tokenizer), "memit", config, progress=False
        ).weights.fingerprint()
    )


@pytest.mark.parametrize("changed", ["layers", "rate"])
def test_a_run_goes_on_where_another_version_derives_other_settings(
    tiny_model: ModelAdapter, tiny_facts: EditSet, tmp_path: Path, changed: str
) -> None:
    fresh = copy.deepcopy(tiny_model.model)
    third = ModelAdapter(copy.deepcopy(fresh), tiny_model.tokenizer)
    config = {**SHORT, "memory": True}
    first = Editor(tiny_model, "memit", config, progress=False)
    first.edit(tiny_facts[:2], batch_size=1, run_dir=tmp_path / "run")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derived, *(("DEPTH", 0.7) if changed == "layers" else ("LR", 0.9)))
        second = Editor(ModelAdapter(fresh, tiny_model.tokenizer), "memit", config, progress=False)
    assert second.config != first.config
    second.edit(tiny_facts[:2], batch_size=1, run_dir=tmp_path / "run", resume=True)
    assert second.config == first.config
    assert second.weights.fingerprint() == first.weights.fingerprint()

    # What the caller chooses still counts.
    other = Editor(third, "memit", {**SHORT, "memory": False}, progress=False)
    with pytest.raises(RunError, match="memory"):
        other.edit(tiny_facts[:2], batch_size=1, run_dir=tmp_path / "run", resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nse", "memit", "alphaedit", "fine", "kne"])
def test_derived_settings_pass_on_a_real_model(method: str) -> None:
    own = replace(METHODS[method], name=f"{method}, derived", presets=None)
    try:
        editor = Editor.from_pretrained("smollm2-135m", own, progress=False)
    except ModelNotFound as error:
        pytest.skip(str(error))

    found = editor.calibrate()
    assert len(found.facts) == calibration.N_FACTS
    assert not found.failed, table(found)
    assert found.seconds < 120
