"""Undo of single edits: the batches from theirs on are solved again without them, from the recorded values."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fastedit.editing.guard import Guard
from fastedit.editing.retry import with_budget
from fastedit.editor import Editor
from fastedit.evaluation.answers import answer
from fastedit.records.edit import Edit, EditSet
from fastedit.runs.log import Record, RunError
from fastedit.runtime.warnings_log import Notes


@dataclass(frozen=True)
class Forgotten:
    """One edit taken back. batches: how many were solved again; log_prob: mean over the target's tokens after the
    prompt, of the model unedited, with the edit, and without it; moved: layer -> ||W - W_before|| / ||W_before - W_0||;
    others: share of the remaining edits with every target token ranked first, before and after."""

    case_id: Any
    batches: int
    seconds: float
    log_prob: tuple[float, float, float]
    moved: dict[int, float]
    others: tuple[float, float]

    @property
    def residual(self) -> float:
        """Its target's log-probability minus that of the unedited model: what the other edits do to it, and what is
        left of this one."""
        return self.log_prob[2] - self.log_prob[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "residual": self.residual}

    def __str__(self) -> str:
        unedited, edited, now = self.log_prob
        moved = max(self.moved.values(), default=0.0)
        return (
            f"case {self.case_id} taken back, {self.batches} batches solved again in {self.seconds:.1f} s\n"
            f"log-probability of its target: {unedited:.2f} unedited, {edited:.2f} with the edit, {now:.2f} without it"
            f" (residual {self.residual:+.2f})\n"
            f"weights moved by {moved:.1%} of all that edits moved them; of the others"
            f" {self.others[0]:.1%} held before, {self.others[1]:.1%} now"
        )


def forget(editor: Editor, case_id: Any) -> Forgotten:
    """Take back one recorded edit. The batches of its run from its own on are written again without it, and come to
    life together, in one record: a crash before that leaves the run as it was.

    Raises RunError when nothing is recorded, ValueError for an unknown case_id; what stops a batch goes on to the
    caller, with the model as it was."""
    recorder = editor.recorder
    if recorder is None:
        raise RunError("forget: wanted an editor with a run directory, got one without")
    live = recorder.live
    holding = [at for at, record in enumerate(live) for each in record.body["edits"] if each["case_id"] == case_id]
    if not holding:
        raise ValueError(f"{recorder.log.folder} holds no edit with case_id {case_id!r} in force")
    started, first = time.perf_counter(), holding[-1]
    (taken,) = [edit for edit in recorder.edits(live[first]) if edit.case_id == case_id]
    others = [edit for edit in editor.edits if edit.case_id != case_id]
    with editor.weights.rewound():
        unedited = answer(editor.model, [(taken.prompt, taken.target_new)])[0].log_prob
    edited, kept = _measure(editor, taken, others)
    changed = {layer: editor.weights.changed(layer) for layer in editor.weights.layers}
    before = {layer: editor.weights.stored(layer, index) for layer, index in changed.items()}
    with recorder.log.writing():
        try:
            editor.restore(first)
            pending = _solve_again(editor, live[first:], case_id)
            recorder.rewind(first, pending)
        except BaseException:
            editor.restore(len(live))
            raise
    editor.restore(first + len(pending))
    now, still = _measure(editor, taken, others)
    moved = {layer: _share(editor, layer, index, before[layer]) for layer, index in changed.items()}
    seconds = time.perf_counter() - started
    return Forgotten(case_id, len(pending), seconds, (unedited, edited, now), moved, (kept, still))


def _solve_again(editor: Editor, records: Sequence[Record], case_id: Any) -> list[Record]:
    recorder = editor.recorder
    assert recorder is not None
    guard, written = Guard(), []
    guard.begin(editor.model, editor.weights)
    for record in records:
        edits = recorder.edits(record)
        rows = [row for row, edit in enumerate(edits) if edit.case_id != case_id]
        if not rows:
            continue
        known = {name: each[rows] for name, each in recorder.values(record).items()}
        left = EditSet(tuple(edits[row] for row in rows))
        config = with_budget(editor.config, record.body["report"]["token_budget"])
        with Notes() as notes:
            editor.write(record.body["batch"], left, config, guard, None, notes, known=known or None, replaced=record)
        written.append(recorder.log.records[-1])
    return written


def _measure(editor: Editor, taken: Edit, others: Sequence[Edit]) -> tuple[float, float]:
    found = answer(editor.model, [(edit.prompt, edit.target_new) for edit in (taken, *others)])
    exact = [each.exact for each in found[1:]]
    return found[0].log_prob, sum(exact) / len(exact) if exact else 1.0


def _share(editor: Editor, layer: int, index: Tensor | None, columns: Tensor) -> float:
    """||W - W_before|| / ||W_before - W_0||, where W_before had these columns at `index` (None = all)."""
    original = editor.weights.original(layer).to(columns.dtype)
    before = original.clone() if index is not None else columns
    if index is not None:
        before[:, index] = columns
    edited = float((before - original).norm())
    return float((editor.weights.stored(layer) - before).norm()) / edited if edited else 0.0
