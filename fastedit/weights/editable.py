"""The only code that writes into a parameter: add an update, restore columns, rewind to the original weights."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.model.adapter import ModelAdapter
from fastedit.ops.apply_delta import apply_delta
from fastedit.runtime.hashing import tensor_bytes


class EditableWeights:
    """The down-projections of the edited layers.

    Originals are copied when the object is made, so rewinding needs no second model. Half-precision weights get a
    float32 master each, in which updates add up; the weight is the rounded master. Every tensor handed out is
    (d_model, d_ff), however the model stores it, and lies on its layer's device; updates may come from elsewhere.
    """

    def __init__(self, model: ModelAdapter, layers: Sequence[int]) -> None:
        self._model = model
        self.layers = tuple(layers)
        self._original = {layer: model.down_parameter(layer).detach().clone() for layer in self.layers}
        self._master = {
            layer: model.oriented(layer, weight).float() for layer, weight in self._original.items() if _is_half(weight)
        }

    def current(self, layer: int) -> Tensor:
        """The weight W as it is now, (d_model, d_ff); not to be written to."""
        return self._model.down_weight(layer)

    def original(self, layer: int) -> Tensor:
        """The weight before any edit, (d_model, d_ff); not to be written to."""
        return self._model.oriented(layer, self._original[layer])

    def columns(self, layer: int, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Copies of the weight's columns `index` (None = all) and of its master's, for `restore`."""
        master = self._master.get(layer)
        weight = self.current(layer)
        if index is None:
            return weight.clone(), None if master is None else master.clone()
        index = index.to(weight.device)
        return weight[:, index], None if master is None else master[:, index]

    def working_dtype(self, layer: int) -> torch.dtype:
        """The dtype in which updates of a layer are added: float32, or float64 for float64 weights."""
        return torch.promote_types(self.current(layer).dtype, torch.float32)

    def stored(self, layer: int, index: Tensor | None = None) -> Tensor:
        """Copy of columns `index` (None = all), (d_model, k): of the master where there is one, else of the weight."""
        weight, master = self.columns(layer, index)
        return weight if master is None else master

    def changed(self, layer: int) -> Tensor | None:
        """Columns that may differ from the original, (k,) int64; None = any."""
        return None

    def put(self, layer: int, index: Tensor | None, values: Tensor) -> None:
        """Write what `stored` returned: the master takes it as it is, a weight in half precision is rounded from it."""
        weight = self.current(layer)
        values = values.to(weight.device)
        is_half = weight.dtype in (torch.bfloat16, torch.float16)
        self.restore(layer, index, (values.to(weight.dtype), values.float() if is_half else None))

    def reset(self) -> None:
        """Go back to the weights before any edit."""
        for layer in self.layers:
            index = self.changed(layer)
            original = self.original(layer)
            self.put(layer, index, original if index is None else original[:, index])

    def add(self, layer: int, index: Tensor | None, residual: Tensor, solution: Tensor) -> None:
        """W[:, S] += R^T X^T; see :func:`fastedit.ops.apply_delta.apply_delta`."""
        weight = self.current(layer)
        chosen = None if index is None else index.to(weight.device)
        residual, solution = residual.to(weight.device), solution.to(weight.device)
        apply_delta(weight, residual, solution, chosen, self._master.get(layer))

    def restore(self, layer: int, index: Tensor | None, saved: tuple[Tensor, Tensor | None]) -> None:
        """Put columns saved by `columns` back, bit for bit."""
        target = self.current(layer)
        chosen = slice(None) if index is None else index.to(target.device)
        weight, master = saved
        target[:, chosen] = weight
        if master is not None:
            self._master[layer][:, chosen] = master

    @contextlib.contextmanager
    def rewound(self) -> Iterator[None]:
        """The original weights inside the block, the present ones after it. Nothing is copied: tensors are swapped."""
        present = {layer: self._model.down_parameter(layer).data for layer in self.layers}
        for layer in self.layers:
            self._model.down_parameter(layer).data = self._original[layer]
        try:
            yield
        finally:
            for layer in self.layers:
                self._model.down_parameter(layer).data = present[layer]

    def fingerprint(self) -> str:
        """SHA-256 over the present edited weights and their masters, hexadecimal."""
        hashes = [_hash(*self.columns(layer, None)) for layer in self.layers]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def layer_hash(self, layer: int) -> str:
        """SHA-256 over one layer's present weight, and its master where there is one; hexadecimal."""
        return _hash(*self.columns(layer, None))


class ColumnWeights(EditableWeights):
    """Down-projections of which few columns are written: originals and masters are kept column by column.

    A column is copied when it is first overwritten, so that any layer may be written at the cost of what is touched.
    """

    def __init__(self, model: ModelAdapter, layers: Sequence[int]) -> None:
        self._model = model
        self.layers = tuple(layers)
        self._touched: dict[int, _Touched] = {}

    def original(self, layer: int) -> Tensor:
        """The weight before any edit, (d_model, d_ff), as a copy."""
        weight = self.current(layer).clone()
        if (touched := self._touched.get(layer)) is not None:
            weight[:, touched.index] = touched.original
        return weight

    def columns(self, layer: int, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As `EditableWeights.columns`; a column that was never written is its own master."""
        weight = self.current(layer)
        chosen = self._chosen(layer, index)
        columns = weight[:, chosen]
        if not _is_half(weight):
            return columns, None
        touched = self._touched.get(layer)
        return columns, columns.float() if touched is None else touched.masters(chosen, columns)

    def add(self, layer: int, index: Tensor | None, residual: Tensor, solution: Tensor) -> None:
        """As `EditableWeights.add`; no index may repeat."""
        weight, chosen = self.current(layer), self._chosen(layer, index)
        columns, master = self.columns(layer, chosen)
        apply_delta(columns, residual.to(weight.device), solution.to(weight.device), None, master)
        self.restore(layer, chosen, (columns, master))

    def changed(self, layer: int) -> Tensor | None:
        """As `EditableWeights.changed`: the columns ever written, ascending."""
        touched = self._touched.get(layer)
        return torch.zeros(0, dtype=torch.int64) if touched is None else touched.index.sort().values

    def layer_hash(self, layer: int) -> str:
        """SHA-256 over the columns of one layer that are not the original ones, with their masters; hexadecimal.

        Columns that were written and put back do not count."""
        if (touched := self._touched.get(layer)) is None:
            return _hash()
        columns, master = self.columns(layer, touched.index)
        differ = _differ(columns, touched.original)
        if master is not None:
            differ |= _differ(master, touched.original.float())
        index = touched.index[differ].sort().values
        return _hash(index, *self.columns(layer, index))

    def restore(self, layer: int, index: Tensor | None, saved: tuple[Tensor, Tensor | None]) -> None:
        """Put columns saved by `columns` back, bit for bit."""
        weight, chosen = self.current(layer), self._chosen(layer, index)
        if layer not in self._touched:
            self._touched[layer] = _Touched.of(weight)
        touched = self._touched[layer]
        touched.take_in(weight, chosen)
        weight[:, chosen] = saved[0]
        if saved[1] is not None and touched.master is not None:
            touched.master[:, touched.place[chosen]] = saved[1]

    @contextlib.contextmanager
    def rewound(self) -> Iterator[None]:
        """The original weights inside the block, the present ones after it, bit for bit."""
        present = {layer: self.current(layer)[:, touched.index] for layer, touched in self._touched.items()}
        for layer, touched in self._touched.items():
            self.current(layer)[:, touched.index] = touched.original
        try:
            yield
        finally:
            for layer, columns in present.items():
                self.current(layer)[:, self._touched[layer].index] = columns

    def _chosen(self, layer: int, index: Tensor | None) -> Tensor:
        weight = self.current(layer)
        return torch.arange(weight.shape[1], device=weight.device) if index is None else index.to(weight.device)


@dataclass
class _Touched:
    """Columns of one weight that were written.

    place: (d_ff,) int64, where a column stands here, -1 = not written; index: (k,) int64; original: (d_model, k);
    master: (d_model, k) float32 for half-precision weights
    """

    place: Tensor
    index: Tensor
    original: Tensor
    master: Tensor | None

    @classmethod
    def of(cls, weight: Tensor) -> _Touched:
        none = torch.arange(0, device=weight.device)
        columns = weight[:, none]
        place = torch.full(weight.shape[1:], -1, device=weight.device)
        return cls(place, none, columns, columns.float() if _is_half(weight) else None)

    def take_in(self, weight: Tensor, chosen: Tensor) -> None:
        """Keep the columns of `chosen` (no repeats) that are not kept yet, as they are in the weight."""
        new = chosen[self.place[chosen] < 0]
        self.place[new] = torch.arange(len(self.index), len(self.index) + len(new), device=weight.device)
        self.index = torch.cat([self.index, new])
        self.original = torch.cat([self.original, weight[:, new]], dim=1)
        if self.master is not None:
            self.master = torch.cat([self.master, weight[:, new].float()], dim=1)

    def masters(self, chosen: Tensor, columns: Tensor) -> Tensor:
        """Masters of the columns `chosen`, whose present content is `columns`."""
        found, place = columns.float(), self.place[chosen]
        if self.master is not None:
            found[:, place >= 0] = self.master[:, place[place >= 0]]
        return found


def _differ(now: Tensor, was: Tensor) -> Tensor:
    """(k,) bool: the columns that differ in a bit."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[now.element_size()]
    return (now.view(bits) != was.view(bits)).any(0)


def _hash(*tensors: Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _is_half(weight: Tensor) -> bool:
    return weight.dtype in (torch.bfloat16, torch.float16)
