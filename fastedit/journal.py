"""Trials: changes of weights that are rolled back bit for bit unless they are committed, and undo of committed ones."""

from __future__ import annotations

from collections import deque
from types import TracebackType

from torch import Tensor

from fastedit.weights import EditableWeights


class Trial:
    """One batch's changes. Leaving the `with` block without `commit` restores every column touched."""

    def __init__(self, weights: EditableWeights) -> None:
        self.weights = weights
        self.committed = False
        self._saved: list[tuple[int, Tensor | None, tuple[Tensor, Tensor | None]]] = []

    def save(self, layer: int, index: Tensor | None) -> None:
        """Remember columns `index` (None = all) of a layer; to be called before they are overwritten."""
        if any(layer == seen and whole is None for seen, whole, _ in self._saved):
            return
        self._saved.append((layer, index, self.weights.columns(layer, index)))

    def commit(self) -> None:
        """Keep the changes when the block ends."""
        self.committed = True

    def rollback(self) -> None:
        """Restore what was saved, last first."""
        for layer, index, saved in reversed(self._saved):
            self.weights.restore(layer, index, saved)
        self._saved.clear()

    def __enter__(self) -> Trial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.committed:
            self.rollback()


class Journal:
    """Committed trials of one editor, the last `depth` of which can be undone. Kept in memory."""

    def __init__(self, weights: EditableWeights, depth: int = 3) -> None:
        self._weights = weights
        self._committed: deque[Trial] = deque(maxlen=depth)

    def __len__(self) -> int:
        return len(self._committed)

    def trial(self) -> Trial:
        """A new trial on the editor's weights."""
        return Trial(self._weights)

    def commit(self, trial: Trial) -> None:
        """Commit a trial and remember it for undo; the oldest one beyond the depth is forgotten."""
        trial.commit()
        self._committed.append(trial)

    def undo(self) -> None:
        """Roll the last committed trial back, bit for bit. Raises ValueError when none is left in memory."""
        if not self._committed:
            raise ValueError("nothing to undo: no committed batch is left in memory")
        self._committed.pop().rollback()
