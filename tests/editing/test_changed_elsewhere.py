"""A model that something else changes between two batches: noticed before anything is written over it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastedit.editor import Editor
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import EditSet
from fastedit.runs.log import RunLog
from fastedit.runs.reports import BatchReport
from fastedit.weights.fingerprint import WeightsChanged

BATCH = 3
METHODS = ("nse", "fine")
DTYPES = ["float32", "bfloat16"]

MakeEditor = Callable[..., Editor]
Change = Callable[[Editor, dict[str, Tensor]], None]


def down(editor: Editor, layer: int) -> torch.nn.Parameter:
    return editor.adapter.down_parameter(layer)


def written_layer(editor: Editor, unedited: dict[str, Tensor]) -> int:
    """A layer that holds edits."""
    adapter, layers = editor.adapter, editor.weights.layers
    return next(i for i in layers if not torch.equal(down(editor, i), unedited[adapter.weight_name(i)]))


def restored(editor: Editor, unedited: dict[str, Tensor]) -> None:
    editor.model.load_state_dict(unedited)


def restored_by_data(editor: Editor, unedited: dict[str, Tensor]) -> None:
    for name, parameter in editor.model.named_parameters():
        parameter.data = unedited[name].clone()


def scaled(editor: Editor, unedited: dict[str, Tensor]) -> None:
    down(editor, written_layer(editor, unedited)).data.mul_(0.5)


def merged(editor: Editor, unedited: dict[str, Tensor]) -> None:
    weight = down(editor, written_layer(editor, unedited)).data
    weight += 0.01 * torch.ones_like(weight)


def replaced(editor: Editor, unedited: dict[str, Tensor]) -> None:
    layer = editor.adapter.layers[written_layer(editor, unedited)]
    layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight.data * 2, requires_grad=False)


CHANGES = (restored, restored_by_data, scaled, merged, replaced)


@pytest.fixture(params=METHODS)
def method(request: Any) -> str:
    return str(request.param)


@pytest.fixture(params=DTYPES)
def editor(request: Any, method: str, fast_editor: MakeEditor) -> Editor:
    """An editor that has written nothing, on a model of this dtype."""
    made = fast_editor(method)
    model = copy.deepcopy(made.model).to(getattr(torch, request.param))
    moments = made.stream.moments
    return Editor(ModelAdapter(model, made.tokenizer), method, made.config, moments, progress=False)


def copied(editor: Editor) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_noticed_before_the_next_write_and_before_undo(
    editor: Editor, stream: EditSet, change: Change, tmp_path: Path
) -> None:
    unedited = copied(editor)
    editor.edit(stream[:BATCH], BATCH, run_dir=tmp_path / "run")
    edited = copied(editor)
    change(editor, unedited)
    now = copied(editor)
    assert not same(now, edited)
    n_records = len(RunLog(tmp_path / "run").records)

    for act in (
        lambda: editor.edit(stream[BATCH : 2 * BATCH], BATCH),
        lambda: editor.undo(),
        lambda: editor.forget(stream[0].case_id),
        lambda: editor.temporarily(stream[BATCH:]).__enter__(),
    ):
        with pytest.raises(WeightsChanged, match="are not those that this editor left"):
            act()
        assert same(copied(editor), now)

    assert len(RunLog(tmp_path / "run").records) == n_records
    assert len(editor.edits) == BATCH

    # What this editor left is put back: all goes on.
    for name, parameter in editor.model.named_parameters():
        parameter.data = edited[name].clone()
    editor.edit(stream[BATCH : 2 * BATCH], BATCH)
    editor.undo(2)
    assert same(copied(editor), unedited)


def test_two_editors_on_one_model_notice_each_other(method: str, fast_editor: MakeEditor, stream: EditSet) -> None:
    first = fast_editor(method)
    second = Editor(first.adapter, method, first.config, first.stream.moments, progress=False)
    first.edit(stream[:BATCH], BATCH)
    before = copied(first)
    with pytest.raises(WeightsChanged):
        second.edit(stream[BATCH : 2 * BATCH], BATCH)
    assert same(copied(first), before)

    third = Editor(first.adapter, method, first.config, first.stream.moments, progress=False)
    third.edit(stream[BATCH : 2 * BATCH], BATCH)
    with pytest.raises(WeightsChanged):
        first.undo()
    third.undo()
    first.undo()


def test_a_change_between_two_batches_of_a_stream_stops_it(fast_editor: MakeEditor, stream: EditSet) -> None:
    editor = fast_editor()

    class Scaling:
        """A watcher that does more than watch."""

        def begin(self) -> None:
            pass

        def after_batch(self, report: BatchReport, last: bool) -> None:
            editor.adapter.down_parameter(editor.weights.layers[0]).data.mul_(1.5)

    with pytest.raises(WeightsChanged, match=f"layer {editor.weights.layers[0]} are not"):
        editor.edit(stream, BATCH, watch=[Scaling()])
    assert len(editor.edits) == BATCH


def test_a_change_inside_a_temporary_block_is_not_overwritten(fast_editor: MakeEditor, stream: EditSet) -> None:
    editor = fast_editor()
    layer = editor.weights.layers[0]
    with pytest.raises(WeightsChanged), editor.temporarily(stream[:BATCH]):
        editor.adapter.down_parameter(layer).data.fill_(1)
    assert bool((editor.adapter.down_parameter(layer) == 1).all())
    assert len(editor.edits) == 0


def test_what_the_editor_does_itself_is_no_change(method: str, fast_editor: MakeEditor, stream: EditSet) -> None:
    editor = fast_editor(method)
    editor.edit(stream[:BATCH], BATCH)
    editor.evaluate(stream[:BATCH])
    with editor.temporarily(stream[BATCH : 2 * BATCH]):
        editor.evaluate(stream[:BATCH])
        with editor.temporarily(stream[2 * BATCH : 3 * BATCH], BATCH):
            editor.undo()
    editor.edit(stream[BATCH : 2 * BATCH], BATCH)
    editor.model.train()
    editor.model.requires_grad_(True)
    editor.undo(2)
    assert editor.weights.changed_elsewhere() == []
