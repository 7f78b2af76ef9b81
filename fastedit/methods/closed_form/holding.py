"""What is held of the edited layers: second moments and solvers of all of them, or of one layer at a time.

Held, a layer takes 12 d_ff^2 bytes: C in float32, and the factor of lambda C or the basis of its null space in float64.
At d_ff 14336 that is 2.5 GB. Where the memory does not suffice for all layers, a second moment is read from its file
when its layer is solved, a factor is kept on the disk, and a basis is made again from the stored eigenvectors. The
numbers are the same bits in either way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from fastedit.methods.closed_form.solver import FactorFile, RidgeSolver, Solver
from fastedit.model.adapter import ModelAdapter
from fastedit.runtime.available_memory import Available, gigabytes

log = logging.getLogger(__name__)


class SolversOnDemand(Mapping[int, Solver]):
    """layer -> solver, made of the layer's second moment each time it is asked for. Factors are kept on the disk.

    moments: layer -> C (d_ff, d_ff); make: makes a solver of one
    """

    def __init__(self, moments: Mapping[int, Tensor], make: Callable[[Tensor], Solver]) -> None:
        self._moments = moments
        self._make = make
        self._files = {layer: FactorFile() for layer in moments}

    def __getitem__(self, layer: int) -> Solver:
        solver = self._make(self._moments[layer])
        if isinstance(solver, RidgeSolver):
            solver.file = self._files[layer]
        return solver

    def check(self, layer: int) -> None:
        """Make the solver of a layer once, for what it may raise."""
        self[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)


def all_fit(model: ModelAdapter, layers: Sequence[int], available: Available) -> bool:
    """Whether second moments and solvers of all layers fit into memory together. If not, that is told in a warning.

    A device that does not tell its memory counts as large enough."""
    left = available(model.device)
    per_layer = 12 * model.d_ff**2
    held = len(layers) * per_layer
    if left is None or held + _beside(model, layers) <= left:
        return True

    log.warning(
        "second moments and solvers of %d layers take %s, and %s of memory are available: one layer at a time is read"
        " and solved, in %s. Results are the same, and each batch takes longer",
        len(layers),
        gigabytes(held),
        gigabytes(left),
        gigabytes(per_layer),
    )
    return False


def _beside(model: ModelAdapter, layers: Sequence[int]) -> int:
    """Bytes that writing a batch takes besides: a system of one layer and its factor, and of each edited weight the
    float32 master and what undoes a batch."""
    weight = model.down_weight(layers[0])
    return 16 * model.d_ff**2 + len(layers) * weight.numel() * (8 + weight.element_size())


def check_upper_copy(model: ModelAdapter, first: int, itemsize: int, available: Available) -> None:
    """Raise ValueError if a copy of the layers from `first` on and of the head does not fit into memory.

    itemsize: bytes per number of the copy"""
    parts = [*model.layers[first:], model.model.get_output_embeddings()]
    wanted = itemsize * sum(parameter.numel() for part in parts for parameter in part.parameters())
    left = available(model.device)

    if left is not None and wanted > left:
        raise ValueError(
            f"value.dtype: a copy of the layers above layer {first - 1} in {8 * itemsize} bits takes"
            f" {gigabytes(wanted)}, and {gigabytes(left)} of memory are available; set value.dtype to model, which"
            " needs no copy, or load the model in bfloat16"
        )
