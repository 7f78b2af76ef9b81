"""The committed batches of an editor, and what it takes to undo the last ones.

A method's state can be large: the sum H of past keys has d_ff^2 numbers per layer. So the state is stored once, as it
was before the oldest batch that can be undone, and of every batch since then only what the state added.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from fastedit.methods.base import AnyState
from fastedit.records.edit import EditSet
from fastedit.runtime.words import counted
from fastedit.weights.trial import Trial


@dataclass
class _Batch:
    """One committed batch.

    kept: what the state added of it
    before: the state before it, for the oldest batch that can be undone
    """

    edits: EditSet
    kept: Mapping[str, Tensor] | None = None
    before: Mapping[str, Tensor] | None = None


class CommittedBatches:
    """The batches in force, in order. The last `undo_depth` of those appended here can be undone, bit for bit.

    batches: edits of batches that were committed before; they cannot be undone here
    """

    def __init__(self, undo_depth: int = 3, batches: Iterable[EditSet] = ()) -> None:
        self._batches = [_Batch(edits) for edits in batches]
        self._trials: deque[Trial] = deque(maxlen=undo_depth)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[EditSet]:
        return (batch.edits for batch in self._batches)

    @property
    def undoable(self) -> int:
        """Number of last batches that can be undone from memory."""
        return len(self._trials)

    def append(self, edits: EditSet, trial: Trial, state: AnyState, kept: Mapping[str, Tensor]) -> None:
        """Commit a trial: its batch is in force, and the state advances by it.

        Whatever the state raises is raised with weights and state as before."""
        trial.commit()
        self._trials.append(trial)
        self._batches.append(_Batch(edits, kept))

        try:
            self._store_state(state)
            state.take_in(kept)
        except BaseException:
            self._take_back(trial, state)
            raise

    def _take_back(self, trial: Trial, state: AnyState) -> None:
        """Undo the last batch, which the state did not take in, or only a part of it."""
        oldest = self._batches[len(self._batches) - self.undoable] if self._trials else None
        try:
            if oldest is not None and oldest.before is not None:
                self._return_state(state, 1)
            else:
                # The state could not be stored, so it has not changed, and memory cannot return to an older one.
                self._trials.clear()
        finally:
            # A state that fails again still leaves the weights as before.
            del self._batches[-1]
            if self._trials:
                self._trials.pop()
            trial.rollback()

    def undo(self, n_batches: int, state: AnyState) -> None:
        """Take the last batches back, weights and state, bit for bit.

        Raises ValueError for more batches than can be undone from memory."""
        if n_batches > self.undoable:
            batches = counted(self.undoable, "batch is", "batches are")
            raise ValueError(f"undo: {batches} in memory, asked for {n_batches}")

        self._return_state(state, n_batches)
        del self._batches[-n_batches:]
        for _ in range(n_batches):
            self._trials.pop().rollback()

    def _return_state(self, state: AnyState, n_batches: int) -> None:
        """Bring the state to what it was before the last batches."""
        oldest, remaining = len(self._batches) - self.undoable, len(self._batches) - n_batches
        before = self._batches[oldest].before or {}
        # Cloned: batches that remain can still be undone from it.
        state.load({name: tensor.clone() for name, tensor in before.items()})
        for batch in self._batches[oldest:remaining]:
            state.take_in(batch.kept or {})

    def _store_state(self, state: AnyState) -> None:
        """Keep the state as it was before the oldest batch that can be undone. `state` lacks the last batch still."""
        depth = self.undoable
        oldest = len(self._batches) - depth

        if depth == 1:
            self._batches[oldest].before = {name: tensor.clone() for name, tensor in state.tensors().items()}
        elif depth and self._batches[oldest].before is None:
            self._batches[oldest].before = _advanced(state, self._batches[oldest - 1])
        if oldest:
            self._batches[oldest - 1].kept = self._batches[oldest - 1].before = None


def _advanced(state: AnyState, batch: _Batch) -> dict[str, Tensor]:
    """The state after a batch, made from the state before it, which is used up. `state` itself does not change."""
    present = state.tensors()
    try:
        state.load(batch.before or {})
        state.take_in(batch.kept or {})
        return state.tensors()
    finally:
        state.load(present)
