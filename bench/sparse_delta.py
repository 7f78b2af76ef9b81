"""sparse_delta of 100 samples of up to twelve rows and six columns each: the sum, and both gradients.

Bytes of the sum: the memory lines of the rows that hold a sample's columns, the vectors, the sum written. Of the
gradients: those lines, vectors and dL/dy read, dL/da (zeros included) and dL/ddelta written.  Operations: 2 per row,
column and component, twice that for the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import Cost, Setting, line_bytes, setting, size_of
from torch import Tensor

from fastedit.ops.sparse_delta import DeltaGrads, sparse_delta, sparse_delta_grads
from fastedit.testing import Factory

# The down-projection before it has read all of W.
COLD = True


def sweep(models: list[str], device: str) -> list[Setting]:
    return [
        setting(model, label, options={"gradients": label == "gradients"})
        for model in models
        for label in ("sum", "gradients")
    ]


def memory(at: Setting) -> int:
    """Bytes, at most, that inputs and one call need; the factory draws in float64."""
    return 4 * 8 * at.case.n_edits * 2 * at.case.n_templates * (at.case.d_ff + at.case.d_model)


def inputs(at: Setting, device: str) -> tuple[Any, ...]:
    given = tuple(Factory(at.case, at.dtype, device).sparse())
    return given if (at.options or {}).get("gradients") else given[:-1]


def call(given: tuple[Any, ...]) -> Tensor | DeltaGrads:
    return sparse_delta_grads(*given) if len(given) == 7 else sparse_delta(*given)


def by_sample(given: tuple[Any, ...]) -> Tensor | DeltaGrads:
    """Two small products for each sample."""
    activations, row_starts, index, slot_starts, delta, scale, *grads = given
    summed = delta.new_zeros(activations.shape[0], delta.shape[1])
    into, columns = torch.zeros_like(activations), torch.zeros_like(delta)
    rows, slots = row_starts.tolist(), slot_starts.tolist()
    for sample in range(len(rows) - 1):
        own, held = slice(rows[sample], rows[sample + 1]), slice(slots[sample], slots[sample + 1])
        at_slots = activations[own].index_select(1, index[held])
        if grads:
            columns[held] = torch.mm(at_slots.T, grads[0][own]).mul_(scale)
            into[own].index_add_(1, index[held], torch.mm(grads[0][own], delta[held].T).mul_(scale))
        else:
            summed[own] = torch.mm(at_slots, delta[held]).mul_(scale)
    return DeltaGrads(into, columns) if grads else summed


PLAIN = {"torch: by sample": by_sample}


def results(given: tuple[Any, ...], made: Tensor | DeltaGrads) -> tuple[Tensor, ...]:
    return (made,) if isinstance(made, Tensor) else tuple(made)


def cost(at: Setting, given: tuple[Any, ...], device: str) -> Cost:
    activations, row_starts, index, slot_starts, delta, _, *grads = given
    line = line_bytes(device)
    pairs = gathered = 0
    rows, slots = row_starts.tolist(), slot_starts.tolist()
    for sample in range(len(rows) - 1):
        n_rows, held = rows[sample + 1] - rows[sample], index[slots[sample] : slots[sample + 1]]
        pairs += n_rows * len(held)
        gathered += n_rows * len((held * activations.element_size() // line).unique()) * line
    flops = 2 * pairs * delta.shape[1]
    if grads:
        return Cost(gathered + 2 * size_of(delta) + size_of(grads[0], activations), 2 * flops, delta.dtype)
    return Cost(gathered + size_of(delta) + activations.shape[0] * delta.shape[1] * 4, flops, delta.dtype)
