"""Notices weights that are not what their writer last left in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class WeightsChanged(ValueError):
    """Edited weights are not those that the editor left: something else wrote into the model."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        which = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
        super().__init__(
            f"the weights of {which} are not those that this editor left: something else changed them (another editor,"
            " a merge, a scaling, a restore). Nothing was written. Put back what the editor left, or make a new editor"
            " for the model as it is now"
        )


class Fingerprint:
    """Sums over the bits of each row of the weights that were noted, by layer.

    All bits are read, since versions of tensors do not show a write through `.data`, and a sample may miss a column.
    SmolLM2-135M takes 5 ms for all 30 layers, a layer of an 8B model in bfloat16 30 ms on two cores.
    """

    def __init__(self) -> None:
        self._noted: dict[int, tuple[torch.dtype, Tensor]] = {}

    def note(self, layer: int, weight: Tensor) -> None:
        """Remember what the weight of a layer is now, (n_rows, n_columns) in the model's own layout."""
        self._noted[layer] = weight.dtype, _row_sums(weight)

    def differs(self, layer: int, weight: Tensor) -> bool:
        """Whether the weight is another than was noted. A move to another device does not count."""
        dtype, sums = self._noted[layer]
        return weight.dtype != dtype or not torch.equal(_row_sums(weight), sums)


def _row_sums(weight: Tensor) -> Tensor:
    """int64 sums over the bits of each row of (n_rows, n_columns), on the CPU."""
    rows = weight.detach().contiguous()
    n_bytes = rows.shape[1] * rows.element_size()

    # Eight bytes at a time: sums of smaller integers are a hundred times slower.
    if n_bytes % 8:
        bits = {2: torch.int16, 4: torch.int32}[rows.element_size()]
        return rows.view(bits).sum(1, dtype=torch.int64).cpu()

    words = rows.view(torch.int64)
    if rows.element_size() < 8:
        return words.sum(1).cpu()

    # An even number of changed signs, the highest bits, would cancel.
    return torch.cat([words.sum(1), (words >> 1).sum(1)]).cpu()
