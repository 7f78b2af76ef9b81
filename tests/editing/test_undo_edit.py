"""One edit taken back: as if it had never been asked for, the others stay, and a crash on the way changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastedit.editing.stream import Stream
from fastedit.editor import Editor
from fastedit.evaluation.answers import answer
from fastedit.records.edit import EditSet
from fastedit.runs.log import RunError

BATCH = 4
Make = Callable[..., Editor]


@pytest.fixture
def edited(tiny_editor: Make, tiny_facts: EditSet, tmp_path: Path) -> Editor:
    editor = tiny_editor()
    editor.edit(tiny_facts[:12], BATCH, run_dir=tmp_path / "run")
    return editor


def test_edit_is_gone_and_the_others_stay(
    edited: Editor, tiny_editor: Make, tiny_facts: EditSet, tmp_path: Path
) -> None:
    taken = tiny_facts[5]
    found = edited.forget(taken.case_id)
    assert found.batches == 2
    unedited, before, now = found.log_prob
    assert before > unedited + 2
    assert now < before - 2
    assert found.difference == now - unedited
    assert found.others[1] >= found.others[0] - 0.1
    assert 0 < max(found.moved.values()) < 1
    assert "difference" in str(found)
    assert "taken back, 2 batches solved again" in str(found)
    assert "taken back, 1 batch solved again" in str(replace(found, batches=1))
    assert found.to_dict()["difference"] == found.difference
    assert [edit.case_id for edit in edited.edits] == [e.case_id for e in tiny_facts[:12] if e is not taken]
    # NSE's values come from the original weights, so this is the run that never had the edit, but for the last bits.
    never = tiny_editor()
    never.edit(tiny_facts[:4])
    never.edit([tiny_facts[4], *tiny_facts[6:8]])
    never.edit(tiny_facts[8:12])
    for layer in edited.weights.layers:
        change = (never.weights.current(layer) - never.weights.original(layer)).norm()
        assert (edited.weights.current(layer) - never.weights.current(layer)).norm() < 1e-3 * change
    # What the target gains beside the unedited model is what the other edits do to it.
    assert answer(never.adapter, [(taken.prompt, taken.target_new)])[0].log_prob == pytest.approx(now, abs=0.02)
    later = Editor.resume(tmp_path / "run", tiny_editor().adapter, moments=never.state.moments, progress=False)
    assert later.weights.fingerprint() == edited.weights.fingerprint()
    assert len(later.edits) == 11


def test_failure_on_the_way_changes_nothing(
    edited: Editor, tiny_editor: Make, tiny_facts: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = edited.weights.fingerprint()
    real, calls = Stream.write_batch, []

    def fails(self: Stream, *rest: Any, **again: Any) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *rest, **again)

    monkeypatch.setattr(Stream, "write_batch", fails)
    with pytest.raises(KeyboardInterrupt):
        edited.forget(tiny_facts[5].case_id)
    monkeypatch.undo()
    assert edited.weights.fingerprint() == before
    assert len(edited.edits) == 12
    later = Editor.resume(tmp_path / "run", tiny_editor().adapter, moments=edited.state.moments, progress=False)
    assert later.weights.fingerprint() == before
    assert edited.forget(tiny_facts[5].case_id).batches == 2


def test_last_edit_of_a_batch_takes_the_batch_with_it(edited: Editor, tiny_facts: EditSet) -> None:
    edited.edit(tiny_facts[20:21])
    before = [edited.weights.current(layer).clone() for layer in edited.weights.layers]
    edited.edit(tiny_facts[21:22])
    found = edited.forget(tiny_facts[21].case_id)
    assert found.batches == 0
    assert all(
        torch.equal(edited.weights.current(n), old) for n, old in zip(edited.weights.layers, before, strict=True)
    )


def test_unknown_edits_and_editors_without_a_run_are_named(edited: Editor, tiny_editor: Make) -> None:
    with pytest.raises(ValueError, match="no edit with case_id 'nobody' in force"):
        edited.forget("nobody")
    with pytest.raises(RunError, match="wanted an editor with a run directory"):
        tiny_editor().forget(1)
