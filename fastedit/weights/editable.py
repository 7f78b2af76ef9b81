"""The only code that writes into a parameter: it adds updates, restores columns and rewinds to the original weights.

W is a layer's down-projection, (d_model, d_ff); a column of W belongs to one neuron.
"""

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
from fastedit.weights.fingerprint import Fingerprint, WeightsChanged


class EditableWeights:
    """The down-projections of the edited layers.

    The original weights are copied when the object is made, so that rewinding needs no second model. A weight in half
    precision has a float32 master, to which updates are added; the weight is the master rounded. The master is made
    when the weight is first written, since it is the weight until then. Tensors returned are
    (d_model, d_ff), however the model stores them, on the device of their layer. Updates may be on another device.
    """

    def __init__(self, model: ModelAdapter, layers: Sequence[int]) -> None:
        self._model = model
        self.layers = tuple(layers)
        self._note_all()
        self._original = {layer: model.down_parameter(layer).detach().clone() for layer in self.layers}
        self._master: dict[int, Tensor] = {}
        # Layers that were ever written here; the others are their originals, bit for bit.
        self._written: set[int] = set()

    def changed_elsewhere(self) -> list[int]:
        """Layers whose weights are not what was last left in them here: something else wrote into the model.

        Layers written inside a `writing` block that is still open are left out."""
        noted = [layer for layer in self.layers if layer not in self._unsettled]
        return [layer for layer in noted if self._left.differs(layer, self._model.down_parameter(layer))]

    def check_untouched(self) -> None:
        """Raise WeightsChanged if something else wrote into the model since the last write here."""
        if layers := self.changed_elsewhere():
            raise WeightsChanged(layers)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around all that writes: `check_untouched` before the block, and after it the weights are what was left.

        Other threads wait."""
        with self._model.lock:
            self.check_untouched()

            try:
                yield
            finally:
                for layer in self._unsettled:
                    self._left.note(layer, self._model.down_parameter(layer))
                self._unsettled.clear()

    def _note_all(self) -> None:
        """Take the present weights for those that were left."""
        self._left = Fingerprint()
        # Written here since the last note.
        self._unsettled: set[int] = set()

        for layer in self.layers:
            self._left.note(layer, self._model.down_parameter(layer))

    def current(self, layer: int) -> Tensor:
        """The present weight W, (d_model, d_ff). A view: do not write to it."""
        return self._model.down_weight(layer)

    def original(self, layer: int) -> Tensor:
        """The weight before any edit, (d_model, d_ff). A view: do not write to it."""
        return self._model.oriented(layer, self._original[layer])

    def columns(self, layer: int, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Copies of columns `index` (None = all) of the weight and of its master, (d_model, k) each, for `restore`.

        The second is None if the weight has no master."""
        weight = self.current(layer)
        master = self._master.get(layer)
        index = None if index is None else index.to(weight.device)

        columns = weight.clone() if index is None else weight[:, index]
        if not _is_half(weight):
            return columns, None
        if master is None:
            return columns, columns.float()

        return columns, master.clone() if index is None else master[:, index]

    def saved(self, layer: int, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As `columns`, for `restore` alone: of a layer that was never written nothing is copied but single columns.

        The second is then None even if the weight gets a master later."""
        if layer in self._written:
            return self.columns(layer, index)

        original = self.original(layer)

        return original if index is None else original[:, index.to(original.device)], None

    def working_dtype(self, layer: int) -> torch.dtype:
        """The dtype in which updates are added to a layer: float64 for a float64 weight, else float32."""
        return torch.promote_types(self.current(layer).dtype, torch.float32)

    def stored(self, layer: int, index: Tensor | None = None) -> Tensor:
        """Copy of columns `index` (None = all) of the master, or of a weight that has none, (d_model, k)."""
        weight, master = self.columns(layer, index)
        return weight if master is None else master

    def changed(self, layer: int) -> Tensor | None:
        """Columns that may differ from the original weight, (k,) int64; None = any column."""
        return None

    def put(self, layer: int, index: Tensor | None, values: Tensor) -> None:
        """Write columns that `stored` returned. A master takes them as they are, and its weight takes them rounded."""
        weight = self.current(layer)
        values = values.to(weight.device)
        master = values.float() if _is_half(weight) else None

        self.restore(layer, index, (values.to(weight.dtype), master))

    def reset(self) -> None:
        """Write the original weights back into the model."""
        for layer in self.layers:
            index = self.changed(layer)
            original = self.original(layer)

            self.put(layer, index, original if index is None else original[:, index])

    def add(self, layer: int, index: Tensor | None, residual: Tensor, solution: Tensor) -> None:
        """W[:, S] += R^T X^T; see :func:`fastedit.ops.apply_delta.apply_delta`.

        index: S, (k,) int64 without repeats, or None for all columns
        residual: R, (n, d_model); solution: X, (k, n)"""
        weight = self.current(layer)
        columns = None if index is None else index.to(weight.device)
        residual = residual.to(weight.device)
        solution = solution.to(weight.device)

        master = self._own_master(layer)
        self._unsettled.add(layer)
        self._written.add(layer)
        apply_delta(weight, residual, solution, columns, master)

    def restore(self, layer: int, index: Tensor | None, saved: tuple[Tensor, Tensor | None]) -> None:
        """Put columns saved by `columns` back, bit for bit."""
        weight = self.current(layer)
        columns = slice(None) if index is None else index.to(weight.device)
        saved_weight, saved_master = saved

        master = self._own_master(layer)
        self._unsettled.add(layer)
        self._written.add(layer)
        weight[:, columns] = saved_weight
        if master is not None:
            # What `saved` returned of a weight that was not written yet was its own master.
            master[:, columns] = saved_weight.float() if saved_master is None else saved_master

    def _own_master(self, layer: int) -> Tensor | None:
        """The float32 master of a layer that is about to be written, (d_model, d_ff); None if the weight has none."""
        if not _is_half(self.current(layer)):
            return None
        if layer not in self._master:
            self._master[layer] = self.original(layer).float()

        return self._master[layer]

    @contextlib.contextmanager
    def rewound(self) -> Iterator[None]:
        """Give the model its original weights inside the block. Tensors are swapped, not copied."""
        with self._model.lock:
            present = {layer: self._model.down_parameter(layer).data for layer in self.layers}

            for layer in self.layers:
                self._model.down_parameter(layer).data = self._original[layer]

        try:
            yield
        finally:
            with self._model.lock:
                for layer in self.layers:
                    self._model.down_parameter(layer).data = present[layer]

    def fingerprint(self) -> str:
        """SHA-256 over the present weights of all edited layers and their masters, hexadecimal."""
        hashes = [_hash(*self.columns(layer, None)) for layer in self.layers]

        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def layer_hash(self, layer: int) -> str:
        """SHA-256 over the present weight of one layer and its master, if it has one, hexadecimal."""
        return _hash(*self.columns(layer, None))


class ColumnWeights(EditableWeights):
    """Down-projections of which few columns are written: originals and masters are kept column by column.

    A column is copied when it is first written, so that memory grows with the number of columns written and any layer
    may be edited.
    """

    def __init__(self, model: ModelAdapter, layers: Sequence[int]) -> None:
        self._model = model
        self.layers = tuple(layers)
        self._note_all()
        self._touched: dict[int, _TouchedColumns] = {}

    def original(self, layer: int) -> Tensor:
        """The weight before any edit, (d_model, d_ff), as a copy."""
        weight = self.current(layer).clone()

        if (touched := self._touched.get(layer)) is not None:
            weight[:, touched.index] = touched.original

        return weight

    def columns(self, layer: int, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As `EditableWeights.columns`; a column that was never written is its own master."""
        weight = self.current(layer)
        index = self._explicit(layer, index)
        columns = weight[:, index]

        if not _is_half(weight):
            return columns, None

        touched = self._touched.get(layer)
        master = columns.float() if touched is None else touched.masters(index, columns)

        return columns, master

    def saved(self, layer: int, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As `columns`."""
        return self.columns(layer, index)

    def add(self, layer: int, index: Tensor | None, residual: Tensor, solution: Tensor) -> None:
        """As `EditableWeights.add`."""
        device = self.current(layer).device
        index = self._explicit(layer, index)
        columns, master = self.columns(layer, index)

        apply_delta(columns, residual.to(device), solution.to(device), None, master)

        self.restore(layer, index, (columns, master))

    def changed(self, layer: int) -> Tensor | None:
        """All columns that were ever written, (k,) int64, ascending."""
        touched = self._touched.get(layer)
        return torch.zeros(0, dtype=torch.int64) if touched is None else touched.index.sort().values

    def layer_hash(self, layer: int) -> str:
        """SHA-256 over the columns of one layer that differ from the original ones, with their masters, hexadecimal.

        Columns that were written and restored since do not count."""
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
        weight = self.current(layer)
        index = self._explicit(layer, index)
        saved_weight, saved_master = saved

        if layer not in self._touched:
            self._touched[layer] = _TouchedColumns.none_of(weight)
        touched = self._touched[layer]
        touched.include(weight, index)

        self._unsettled.add(layer)
        weight[:, index] = saved_weight
        if saved_master is not None and touched.master is not None:
            touched.master[:, touched.place[index]] = saved_master

    @contextlib.contextmanager
    def rewound(self) -> Iterator[None]:
        """Give the model its original weights inside the block, and the present ones after it, bit for bit."""
        with self._model.lock:
            indices = {layer: touched.index for layer, touched in self._touched.items()}
            present = {layer: self.current(layer)[:, index] for layer, index in indices.items()}

            for layer, touched in self._touched.items():
                self.current(layer)[:, touched.index] = touched.original

        try:
            yield
        finally:
            with self._model.lock:
                for layer, columns in present.items():
                    self.current(layer)[:, indices[layer]] = columns

    def _explicit(self, layer: int, index: Tensor | None) -> Tensor:
        """The indices on the layer's device; those of all columns for None."""
        weight = self.current(layer)
        return torch.arange(weight.shape[1], device=weight.device) if index is None else index.to(weight.device)


@dataclass
class _TouchedColumns:
    """The k columns of one weight that were written.

    place: (d_ff,) int64, for each column of the weight its position among the k, -1 = not written
    index: (k,) int64, the columns in the order in which they were first written
    original: (d_model, k), as they were before; master: (d_model, k) float32, None unless the weight is half precision
    """

    place: Tensor
    index: Tensor
    original: Tensor
    master: Tensor | None

    @classmethod
    def none_of(cls, weight: Tensor) -> _TouchedColumns:
        """The state before anything is written."""
        index = torch.arange(0, device=weight.device)
        columns = weight[:, index]
        place = torch.full(weight.shape[1:], -1, device=weight.device)

        return cls(place, index, columns, columns.float() if _is_half(weight) else None)

    def include(self, weight: Tensor, index: Tensor) -> None:
        """Copy the columns `index` (without repeats) that are not among the k yet, as they are in the weight."""
        new = index[self.place[index] < 0]

        self.place[new] = torch.arange(len(self.index), len(self.index) + len(new), device=weight.device)
        self.index = torch.cat([self.index, new])
        self.original = torch.cat([self.original, weight[:, new]], dim=1)
        if self.master is not None:
            self.master = torch.cat([self.master, weight[:, new].float()], dim=1)

    def masters(self, index: Tensor, columns: Tensor) -> Tensor:
        """Masters of the columns `index`, whose present content is `columns`. One never written is its own master."""
        masters = columns.float()
        place = self.place[index]

        if self.master is not None:
            masters[:, place >= 0] = self.master[:, place[place >= 0]]

        return masters


def _differ(now: Tensor, was: Tensor) -> Tensor:
    """Which columns of two (d_model, k) tensors of one dtype differ in any bit, (k,) bool."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[now.element_size()]

    return (now.view(bits) != was.view(bits)).any(0)


def _hash(*tensors: Tensor | None) -> str:
    """SHA-256 over the bytes of the tensors, hexadecimal; None is left out."""
    digest = hashlib.sha256()

    for tensor in tensors:
        if tensor is not None:
            digest.update(tensor_bytes(tensor))

    return digest.hexdigest()


def _is_half(weight: Tensor) -> bool:
    return weight.dtype in (torch.bfloat16, torch.float16)
