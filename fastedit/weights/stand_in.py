"""Other weights in a model for a while, without writing into one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from fastedit.model.adapter import ModelAdapter


@contextlib.contextmanager
def standing_in(model: ModelAdapter, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the model other weights inside the block. Tensors are swapped, not copied.

    tensors: parameter name -> tensor of its shape, dtype and device
    Other threads wait until the block ends."""
    with model.lock:
        parameters = model.parameters()
        present = {name: parameters[name].data for name in tensors}

        try:
            for name, tensor in tensors.items():
                parameters[name].data = tensor
            yield
        finally:
            for name, tensor in present.items():
                parameters[name].data = tensor
