"""Editors in threads: the same bits as alone, and one editor in two threads takes turns or is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastedit.editing.stream import EditorBusy
from fastedit.editor import Editor
from fastedit.records.edit import EditSet
from fastedit.runs.reports import BatchReport

BATCH = 3

MakeEditor = Callable[..., Editor]


def bits(editor: Editor) -> list[torch.Tensor]:
    return [editor.weights.current(layer).clone() for layer in editor.weights.layers]


def test_editors_in_threads_write_what_they_write_alone(fast_editor: MakeEditor, stream: EditSet) -> None:
    alone = fast_editor()
    alone.edit(stream[: 2 * BATCH], BATCH)
    editors = [fast_editor() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(editor.edit, stream[: 2 * BATCH], BATCH) for editor in editors]:
            done.result()
    for editor in editors:
        assert all(torch.equal(one, other) for one, other in zip(bits(editor), bits(alone), strict=True))


class Waiting:
    """A watcher that holds the stream between two batches."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.released = threading.Event()

    def begin(self) -> None:
        pass

    def after_batch(self, report: BatchReport, last: bool) -> None:
        self.reached.set()
        assert self.released.wait(60)


def test_an_editor_that_edits_in_another_thread_refuses(fast_editor: MakeEditor, stream: EditSet) -> None:
    editor, waiting = fast_editor(), Waiting()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(editor.edit, stream[: 2 * BATCH], BATCH, watch=[waiting])
        assert waiting.reached.wait(60)
        try:
            for act in (
                lambda: editor.edit(stream[2 * BATCH :], BATCH),
                lambda: editor.undo(),
                lambda: editor.evaluate(stream[:BATCH]),
                lambda: editor.temporarily(stream[2 * BATCH :]).__enter__(),
            ):
                with pytest.raises(EditorBusy, match="another thread is editing with this editor"):
                    act()
        finally:
            waiting.released.set()
        done.result()
    assert len(editor.edits) == 2 * BATCH
    editor.undo()


def test_questions_of_other_threads_take_turns_with_batches(fast_editor: MakeEditor, stream: EditSet) -> None:
    alone = fast_editor()
    alone.edit(stream[: 2 * BATCH], BATCH)
    editor = fast_editor()
    with ThreadPoolExecutor(3) as pool:
        done = pool.submit(editor.edit, stream[: 2 * BATCH], BATCH)
        asked = [pool.submit(editor.ask, ["The twin of"], 4) for _ in range(4)]
        done.result()
        assert all(len(question.result()) == 1 for question in asked)
    assert all(torch.equal(one, other) for one, other in zip(bits(editor), bits(alone), strict=True))


def test_an_editor_can_be_copied(fast_editor: MakeEditor, stream: EditSet) -> None:
    editor = fast_editor()
    twin = copy.deepcopy(editor)
    editor.edit(stream[:BATCH], BATCH)
    twin.edit(stream[:BATCH], BATCH)
    assert all(torch.equal(one, other) for one, other in zip(bits(editor), bits(twin), strict=True))
