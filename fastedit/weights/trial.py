"""Trials: changes of weights that are rolled back bit for bit unless they are committed, and their replay from disk."""

from __future__ import annotations

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

        # A replay from a file has the same dtype and layout: with others BLAS gives other bits.
        dtype = self.weights.working_dtype(layer)
        residual = residual.to(dtype).contiguous()
        solution = solution.to(dtype).contiguous()

        self.weights.add(layer, index, residual, solution)
        self._updates.append(Update(layer, index, residual, solution))

    @property
    def touched(self) -> dict[int, Tensor | None]:
        """layer -> columns that were saved, (k,) int64 ascending on the CPU, None for all."""
        touched: dict[int, Tensor | None] = {}
        for layer, index, _ in self._saved:
            columns = touched.get(layer, torch.zeros(0, dtype=torch.int64))
            if index is None or columns is None:
                touched[layer] = None
            else:
                touched[layer] = torch.unique(torch.cat([columns, index.cpu()]))
        return touched

    def written(self) -> dict[str, Tensor]:
        """What `replay` needs to write this trial again, bit for bit: per layer the updates, or the new columns where
        these are smaller."""
        tensors: dict[str, Tensor] = {}
        for layer, index in self.touched.items():
            updates = [update for update in self._updates if update.layer == layer]
            update_bytes = sum(update.residual.nbytes + update.solution.nbytes for update in updates)

            d_model, d_ff = self.weights.current(layer).shape
            n_columns = d_ff if index is None else len(index)
            column_bytes = n_columns * d_model * self.weights.working_dtype(layer).itemsize

            if update_bytes >= column_bytes:
                tensors[f"columns/{layer}/values"] = self.weights.stored(layer, index)
                if index is not None:
                    tensors[f"columns/{layer}/index"] = index
                continue

            for number, update in enumerate(updates):
                place = f"update/{layer}/{number:04d}"
                tensors[f"{place}/residual"] = update.residual
                tensors[f"{place}/solution"] = update.solution
                if update.index is not None:
                    tensors[f"{place}/index"] = update.index
        return tensors

    def _save(self, layer: int, index: Tensor | None) -> None:
        """Copy columns before they are overwritten, unless the whole layer was copied before."""
        if any(layer == saved and whole is None for saved, whole, _ in self._saved):
            return
        self._saved.append((layer, index, self.weights.saved(layer, index)))

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


def replay(weights: EditableWeights, tensors: Mapping[str, Tensor]) -> None:
    """Write what `Trial.written` returned again, onto weights as they were before that trial."""
    for name in sorted(tensors):
        kind, layer, *rest = name.split("/")
        if kind == "columns" and rest == ["values"]:
            weights.put(int(layer), tensors.get(f"columns/{layer}/index"), tensors[name])
        if kind == "update" and rest[-1] == "residual":
            place = name.removesuffix("residual")
            weights.add(int(layer), tensors.get(f"{place}index"), tensors[name], tensors[f"{place}solution"])
