"""Runs of methods that write single columns: as true as others, at the cost of what they touch."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastedit.editor import Editor
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import EditSet
from fastedit.runs.log import RunError, RunLog

BATCH = 3
METHODS = [("fine", {}), ("fine", {"protect": True}), ("kne", {}), ("kn", {})]
Make = Callable[..., Editor]


def bits(editor: Editor) -> list[bytes]:
    weights = [editor.adapter.down_parameter(layer) for layer in range(editor.adapter.n_layers)]
    return [weight.view(torch.uint8).numpy().tobytes() for weight in weights]


def prints(editor: Editor) -> tuple[Any, ...]:
    """What must come out bit for bit: the weights and their masters, and the state."""
    state = {name: tensor.numpy().tobytes() for name, tensor in editor.state.tensors().items()}
    hashes = [editor.weights.layer_hash(layer) for layer in editor.weights.layers]
    return bits(editor), editor.weights.fingerprint(), hashes, state


@pytest.mark.parametrize(("method", "changes"), METHODS, ids=["fine", "fine, protect", "kne", "kn"])
def test_undo_in_memory_from_disk_and_in_a_later_process(
    method: str,
    changes: dict[str, Any],
    fast_editor: Make,
    stream: EditSet,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    editor = fast_editor(method, **changes)
    wanted = [prints(editor)]
    for start in range(0, 15, BATCH):
        editor.edit(stream[start : start + BATCH], BATCH, run_dir=tmp_path / "run")
        wanted.append(prints(editor))
    assert len({str(each) for each in wanted}) == len(wanted)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    later = Editor.resume(tmp_path / "copy", fast_editor().adapter, progress=False)
    assert prints(later) == wanted[5]
    for undone in (editor, later):
        undone.undo(last=2)
        assert prints(undone) == wanted[3]
        undone.undo(to=1)
        assert prints(undone) == wanted[1]
        undone.edit(stream[3:6], BATCH)
        assert prints(undone) == wanted[2]
        undone.undo(to=0)
        assert prints(undone) == wanted[0]
    assert all("their changes are summed" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_with_its_masters(
    dtype: torch.dtype, fast_editor: Make, stream: EditSet, tmp_path: Path, tiny_parts: tuple[Any, Any]
) -> None:
    def half() -> ModelAdapter:
        return ModelAdapter(copy.deepcopy(tiny_parts[0]).to(dtype), tiny_parts[1])

    first = Editor(half(), "fine", fast_editor("fine").config, progress=False)
    first.edit(stream[:6], BATCH, run_dir=tmp_path / "run")
    second = Editor.resume(tmp_path / "run", half(), progress=False)
    assert prints(second) == prints(first)
    second.edit(stream[6:9], BATCH)
    first.stream.recorder = None
    first.edit(stream[6:9], BATCH)
    assert prints(second) == prints(first)


def test_snapshots_hold_the_columns_touched(
    fast_editor: Make, stream: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastedit.runs.recorder.SNAPSHOT_SHARE", 0.5)
    editor = fast_editor("fine")
    editor.edit(stream, BATCH, run_dir=tmp_path / "run")
    records = RunLog(tmp_path / "run").records
    whole = sum(editor.weights.current(layer).nbytes for layer in editor.weights.layers)
    snapshots = [record for record in records if record.kind == "snapshot"]
    assert snapshots
    assert all(record.size < whole / 2 for record in snapshots)
    again = Editor.resume(tmp_path / "run", fast_editor().adapter, progress=False)
    assert prints(again) == prints(editor)


@pytest.mark.parametrize("method", ["fine", "kne"])
def test_an_edit_taken_back(method: str, tiny_editor: Make, tiny_facts: EditSet, tmp_path: Path) -> None:
    editor, plain = tiny_editor(method), tiny_editor(method)
    editor.edit(tiny_facts[:4], 2, run_dir=tmp_path / "run")
    found = editor.forget(tiny_facts[1].case_id)
    unedited, edited, now = found.log_prob
    assert found.batches == 2
    assert edited > unedited + 1
    assert now < edited - 1
    plain.edit(tiny_facts[:1], 2)
    plain.edit(tiny_facts[2:4], 2)
    # Nothing of its batch is known before it is trained again, so these are the bits of the run that never had it.
    assert prints(editor) == prints(plain)
    assert 0 < max(found.moved.values()) < 2
    later = Editor.resume(tmp_path / "run", tiny_editor().adapter, progress=False)
    assert prints(later) == prints(editor)


def test_temporary_edits_touch_their_columns_only(fast_editor: Make, stream: EditSet) -> None:
    editor = fast_editor("kne")
    editor.edit(stream[:6], BATCH)
    before = prints(editor)
    with editor.temporarily(stream[6:15], BATCH):
        assert prints(editor) != before
    assert prints(editor) == before
    editor.undo()
    alone = fast_editor("kne")
    alone.edit(stream[:3], BATCH)
    assert prints(editor) == prints(alone)


def test_common_neurons_of_another_text_are_refused(fast_editor: Make, stream: EditSet, tmp_path: Path) -> None:
    leaving_out = {"common_share": 0.05, "background": {"tokens": 512, "window": 32}}
    fast_editor("fine", **leaving_out).edit(stream[:3], run_dir=tmp_path / "run")
    same, other = fast_editor("fine", **leaving_out), fast_editor("fine", **leaving_out)
    same.edit(stream[:3], run_dir=tmp_path / "run", resume=True)
    other.state.common = ~other.state.common
    with pytest.raises((ValueError, RunError), match="are not those that the run began with"):
        other.edit(stream[:3], run_dir=tmp_path / "run", resume=True)


def test_lack_of_memory_halves_the_budget_of_training(
    fast_editor: Make, stream: EditSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fastedit.methods.columns.fine as recipe

    real = recipe.train_columns

    def short(model: Any, sequences: Any, slots: Any, config: Any, *rest: Any) -> Any:
        if config.token_budget > 300:
            raise MemoryError
        return real(model, sequences, slots, config, *rest)

    monkeypatch.setattr(recipe, "train_columns", short)
    with caplog.at_level(logging.ERROR):
        run = fast_editor("fine").edit(stream[:3])
    assert run.batches[0].token_budget == 256
    assert fast_editor("kn").edit(stream[:3]).batches[0].token_budget is None
