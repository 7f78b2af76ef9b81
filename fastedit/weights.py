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
        """SHA-256 over the present edited weights, hexadecimal."""
        digest = hashlib.sha256()
        for layer in self.layers:
            digest.update(self.current(layer).cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
