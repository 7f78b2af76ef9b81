"""Undo of one edit: the batches from its own on are written again without it, from recorded values if any."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fastedit.editing.guard import Guard
from fastedit.editing.stream import Rewrite, Stream
from fastedit.evaluation.answers import answer
from fastedit.records.edit import CaseId, Edit, EditSet
from fastedit.runs.log import Record, RunError
from fastedit.runs.recorder import Recorder
from fastedit.runtime.words import counted
from fastedit.weights.editable import EditableWeights


@dataclass(frozen=True)
class Forgotten:
    """One edit taken back.

    batches: how many were solved again
    log_prob: of its target after its prompt, mean over the tokens: unedited model, with the edit, without it
    moved: layer -> ||W - W_before|| / ||W_before - W_0||
    others: share of the remaining edits with every target token ranked first, before and after
    """

    case_id: CaseId
    batches: int
    seconds: float
    log_prob: tuple[float, float, float]
    moved: dict[int, float]
    others: tuple[float, float]

    @property
    def difference(self) -> float:
        """The target's log-probability minus the unedited model's: the effect of the other edits and what is left of
        this one."""
        return self.log_prob[2] - self.log_prob[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "difference": self.difference}

    def __str__(self) -> str:
        unedited, edited, now = self.log_prob
        moved = max(self.moved.values(), default=0.0)
        batches = counted(self.batches, "batch", "batches")
        return (
            f"case {self.case_id} taken back, {batches} solved again in {self.seconds:.1f} s\n"
            f"log-probability of its target: {unedited:.2f} unedited, {edited:.2f} with the edit, {now:.2f} without it"
            f" (difference {self.difference:+.2f})\n"
            f"weights moved by {moved:.1%} of all that edits moved them; of the others"
            f" {self.others[0]:.1%} held before, {self.others[1]:.1%} now"
        )


def forget(stream: Stream, case_id: CaseId) -> Forgotten:
    """Take back one recorded edit. The batches of its run from its own on are written again without it.

    One record brings the new batches into force together: a crash before it leaves the run as it was.
    Raises RunError when nothing is recorded, ValueError for an unknown case_id. Whatever stops a batch is raised with
    the model as it was."""
    recorder = stream.recorder
    if recorder is None:
        raise RunError("forget: wanted an editor with a run directory, got one without")

    started = time.perf_counter()
    live = recorder.live
    first = _batch_of(recorder, case_id)
    (taken,) = [edit for edit in recorder.edits(live[first]) if edit.case_id == case_id]
    others = [edit for edit in stream.edits if edit.case_id != case_id]

    weights = stream.weights
    with weights.rewound():
        unedited = answer(stream.adapter, [(taken.prompt, taken.target_new, taken.join)])[0].log_prob
    edited, others_before = _measure(stream, taken, others)
    changed = {layer: weights.changed(layer) for layer in weights.layers}
    before = {layer: weights.stored(layer, index) for layer, index in changed.items()}

    with recorder.log.writing():
        try:
            stream.restore(first)
            pending = _write_without(stream, recorder, live[first:], case_id)
            recorder.rewind(first, pending)
        except BaseException:
            stream.restore(len(live))
            raise
    stream.restore(first + len(pending))

    now, others_now = _measure(stream, taken, others)
    moved = {layer: _share_moved(weights, layer, index, before[layer]) for layer, index in changed.items()}
    return Forgotten(
        case_id=case_id,
        batches=len(pending),
        seconds=time.perf_counter() - started,
        log_prob=(unedited, edited, now),
        moved=moved,
        others=(others_before, others_now),
    )


def _batch_of(recorder: Recorder, case_id: CaseId) -> int:
    """Position of the last live batch that holds the edit. Raises ValueError when none does."""
    for position in reversed(range(len(recorder.live))):
        if any(edit["case_id"] == case_id for edit in recorder.live[position].body["edits"]):
            return position
    raise ValueError(f"{recorder.log.folder} holds no edit with case_id {case_id!r} in force")


def _write_without(stream: Stream, recorder: Recorder, records: Sequence[Record], case_id: CaseId) -> list[Record]:
    """Write the recorded batches again without one edit; their new records, which are pending."""
    guard = Guard()
    guard.begin(stream.adapter, stream.weights)

    written = []
    for record in records:
        edits = recorder.edits(record)
        rows = [row for row, edit in enumerate(edits) if edit.case_id != case_id]
        if not rows:
            continue

        known = {name: tensor[rows] for name, tensor in recorder.values(record).items()}
        remaining = EditSet(tuple(edits[row] for row in rows))
        budget = record.body["report"]["token_budget"]
        rewrite = Rewrite(record, known or None)
        stream.write_batch(record.body["batch"], remaining, guard, token_budget=budget, rewrite=rewrite)
        written.append(recorder.log.records[-1])
    return written


def _measure(stream: Stream, taken: Edit, others: Sequence[Edit]) -> tuple[float, float]:
    """Log-probability of the target taken back, and the share of the others with every target token ranked first."""
    answers = answer(stream.adapter, [(edit.prompt, edit.target_new, edit.join) for edit in (taken, *others)])
    exact = [scored.exact for scored in answers[1:]]
    return answers[0].log_prob, sum(exact) / len(exact) if exact else 1.0


def _share_moved(weights: EditableWeights, layer: int, index: Tensor | None, columns: Tensor) -> float:
    """||W - W_before|| / ||W_before - W_0||, where W_before had these columns at `index` (None = all)."""
    original = weights.original(layer).to(columns.dtype)
    before = original.clone() if index is not None else columns
    if index is not None:
        before[:, index] = columns

    edited = float((before - original).norm())
    return float((weights.stored(layer) - before).norm()) / edited if edited else 0.0
