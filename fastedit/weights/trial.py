"""Trials: changes of weights that are rolled back bit for bit unless they are committed, and undo of committed ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from fastedit.weights.editable import EditableWeights


@dataclass(frozen=True)
class Update:
    """W[:, S] += R^T X^T of one layer. index: (k,) or None = all; residual: (n, d_model); solution: (k, n)."""

    layer: int
    index: Tensor | None
    residual: Tensor
    solution: Tensor


class Trial:
    """One batch's changes. Leaving the `with` block without `commit` restores every column touched."""

    def __init__(self, weights: EditableWeights) -> None:
        self.weights = weights
        self.committed = False
        self._saved: list[tuple[int, Tensor | None, tuple[Tensor, Tensor | None]]] = []
        self._updates: list[Update] = []

    def add(self, layer: int, index: Tensor | None, residual: Tensor, solution: Tensor) -> None:
        """Save the columns `index`, then add an update to them, see `EditableWeights.add`."""
        self._save(layer, index)
        # The same dtype and layout when it is replayed from a file: BLAS gives other bits for other ones.
        dtype = self.weights.working_dtype(layer)
        residual, solution = (each.to(dtype).contiguous() for each in (residual, solution))
        self.weights.add(layer, index, residual, solution)
        self._updates.append(Update(layer, index, residual, solution))

    @property
    def touched(self) -> dict[int, Tensor | None]:
        """layer -> columns that were saved, (k,) int64 ascending on the CPU, None for all."""
        found: dict[int, Tensor | None] = {}
        for layer, index, _ in self._saved:
            known = found.get(layer, torch.zeros(0, dtype=torch.int64))
            found[layer] = None if index is None or known is None else torch.unique(torch.cat([known, index.cpu()]))
        return found

    def written(self) -> dict[str, Tensor]:
        """What `rewrite` needs to write this again, bit for bit: the updates of each layer, or its new columns where
        these are smaller."""
        tensors: dict[str, Tensor] = {}
        for layer, index in self.touched.items():
            updates = [update for update in self._updates if update.layer == layer]
            size = sum(update.residual.nbytes + update.solution.nbytes for update in updates)
            d_model, d_ff = self.weights.current(layer).shape
            n_columns = d_ff if index is None else len(index)
            if size >= n_columns * d_model * self.weights.working_dtype(layer).itemsize:
                tensors[f"columns/{layer}/values"] = self.weights.stored(layer, index)
                if index is not None:
                    tensors[f"columns/{layer}/index"] = index
                continue
            for number, update in enumerate(updates):
                place = f"update/{layer}/{number:04d}"
                tensors[f"{place}/residual"], tensors[f"{place}/solution"] = update.residual, update.solution
                if update.index is not None:
                    tensors[f"{place}/index"] = update.index
        return tensors

    def _save(self, layer: int, index: Tensor | None) -> None:
        if any(layer == seen and whole is None for seen, whole, _ in self._saved):
            return
        self._saved.append((layer, index, self.weights.columns(layer, index)))

    def commit(self) -> None:
        """Keep the changes when the block ends."""
        self.committed = True
        self._updates.clear()

    def rollback(self) -> None:
        """Restore what was saved, last first."""
        for layer, index, saved in reversed(self._saved):
            self.weights.restore(layer, index, saved)
        self._saved.clear()
        self._updates.clear()

    def __enter__(self) -> Trial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.committed:
            self.rollback()


def rewrite(weights: EditableWeights, tensors: Mapping[str, Tensor]) -> None:
    """Write what `Trial.written` returned once more, onto the weights it was written onto then."""
    for name in sorted(tensors):
        kind, layer, *rest = name.split("/")
        if kind == "columns" and rest == ["values"]:
            weights.put(int(layer), tensors.get(f"columns/{layer}/index"), tensors[name])
        if kind == "update" and rest[-1] == "residual":
            place = name.removesuffix("residual")
            weights.add(int(layer), tensors.get(f"{place}index"), tensors[name], tensors[f"{place}solution"])


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

    def forget(self) -> None:
        """Keep no trial: what the weights are now did not come from the last one."""
        self._committed.clear()

    def undo(self) -> None:
        """Roll the last committed trial back, bit for bit. Raises ValueError when none is left in memory."""
        if not self._committed:
            raise ValueError("nothing to undo: no committed batch is left in memory")
        self._committed.pop().rollback()
