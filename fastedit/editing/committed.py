"""The batches of an editor that are in force, and what it takes to forget the last ones.

A method's state can be large (the sum H of past keys has d_ff^2 numbers a layer), so it is kept once, as it was before
the oldest batch that can be undone, and of the batches since then only what the state took in of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fastedit.methods.base import State
from fastedit.records.edit import EditSet


@dataclass
class _Batch:
    """A batch. kept: of it in the state; before: the state before it, of the oldest that can be undone."""

    edits: EditSet
    kept: Mapping[str, Tensor] | None = None
    before: Mapping[str, Tensor] | None = None


class History:
    """Batches in order. Those that `append` was not told of cannot be undone here."""

    def __init__(self, batches: Iterable[EditSet] = ()) -> None:
        self._batches = [_Batch(edits) for edits in batches]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[EditSet]:
        return (batch.edits for batch in self._batches)

    def copy(self) -> History:
        """One that goes on from here without this one."""
        found = History()
        found._batches = [replace(batch) for batch in self._batches]
        return found

    def append(self, edits: EditSet, state: State, kept: Mapping[str, Tensor], depth: int) -> None:
        """Take in a committed batch, also into the state. depth: batches that can be undone, with this one."""
        oldest = len(self._batches) + 1 - depth
        self._batches.append(_Batch(edits, kept))
        if depth == 1:
            self._batches[oldest].before = {name: each.clone() for name, each in state.tensors().items()}
        elif depth and (first := self._batches[oldest]).before is None:
            first.before = _one_on(state, self._batches[oldest - 1])
        if oldest:
            self._batches[oldest - 1].kept = self._batches[oldest - 1].before = None
        state.take_in(kept)

    def undo(self, taken: int, state: State, depth: int) -> None:
        """Forget the last batches, also in the state, bit for bit. depth: batches that can be undone, at least taken"""
        oldest, stays = len(self._batches) - depth, len(self._batches) - taken
        before = self._batches[oldest].before or {}
        # Batches that stay can still be undone from it.
        state.load({name: each.clone() for name, each in before.items()})
        for batch in self._batches[oldest:stays]:
            state.take_in(batch.kept or {})
        del self._batches[stays:]


def _one_on(state: State, batch: _Batch) -> dict[str, Tensor]:
    """The state after a batch, from that before it, which is used up; `state` itself only lends its hand."""
    present = state.tensors()
    try:
        state.load(batch.before or {})
        state.take_in(batch.kept or {})
        return state.tensors()
    finally:
        state.load(present)
