"""The only code that writes into a parameter: add an update, restore columns, rewind to the original weights."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastedit.adapter import ModelAdapter
from fastedit.ops.apply_delta import apply_delta


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
            layer: model.oriented(layer, weight).float()
            for layer, weight in self._original.items()
            if weight.dtype in (torch.bfloat16, torch.float16)
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
        return hashlib.sha256("".join(map(self.layer_hash, self.layers)).encode()).hexdigest()

    def layer_hash(self, layer: int) -> str:
        """SHA-256 over one layer's present weight, and its master where there is one; hexadecimal."""
        digest = hashlib.sha256()
        for tensor in self.columns(layer, None):
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()
