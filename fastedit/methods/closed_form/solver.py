"""The linear systems of the closed-form updates, solved for X with one column per edit.

RidgeSolver:      (weight * C + H + K^T K)[S, S] X = K_S^T           (MEMIT, NSE)
NullSpaceSolver:  (P (K^T K + H) + ridge I) X = P K^T, P = U U^T     (AlphaEdit)

K (n_edits, d_ff) holds the keys of a batch, C the second moment, H the sum of k k^T over past edits, and S the selected
neurons. The keys of past edits are kept as rows while they are at most half as many as the neurons, and as the dense
sum H from then on. With every neuron selected and past keys as rows, the Cholesky factor L of weight * C is computed
once per layer, and by the Woodbury identity
    X = L^-T U (I + U^T U)^-1 E,   U = L^-1 [past keys, keys]^T,   E the columns of this batch
so that no other d_ff x d_ff system is factored. Everything is float64: C has a long tail of small eigenvalues.

L takes 8 d_ff^2 bytes per layer. Where memory is short, `holding.SolversOnDemand` keeps it in a `FactorFile`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from typing import IO, Any, Protocol

import numpy
import torch
from torch import Tensor

from fastedit.ops.gram_update import gram_update
from fastedit.ops.masked_gram import masked_gram
from fastedit.runtime.cache import cache_folder
from fastedit.runtime.words import told_by

log = logging.getLogger(__name__)

JITTERS = (0.0, 1e-12, 1e-10, 1e-8)


class NotPositiveDefinite(ValueError):
    """A system could not be factored even with the largest jitter: the second moment is of too few tokens, or it or a
    key is damaged."""


class PastKeys:
    """Keys of all committed edits of one layer.

    n_edits: their number
    rows: (n_edits, d_ff) float32 while n_edits <= d_ff / 2, then None
    dense: H, the sum of k k^T, (d_ff, d_ff) float32 from then on, before that None
    """

    def __init__(self, d_ff: int, device: torch.device | str = "cpu") -> None:
        self.n_edits = 0
        self.d_ff = d_ff
        self.device = device
        self.rows: Tensor | None = torch.zeros(0, d_ff, device=device)
        self.dense: Tensor | None = None

    def add(self, keys: Tensor) -> None:
        """Add the keys (n, d_ff) of committed edits."""
        self.n_edits += keys.shape[0]
        keys = keys.float().contiguous()

        if self.rows is not None:
            self.rows = torch.cat([self.rows, keys])
            d_ff = keys.shape[1]
            if self.rows.shape[0] > d_ff // 2:
                self.dense = gram_update(self.rows.new_zeros(d_ff, d_ff), self.rows)
                self.rows = None
        elif self.dense is not None:
            gram_update(self.dense, keys)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that `load` needs: "n_edits", and "rows" or "dense". `add` changes a dense tensor in place."""
        tensors = {"n_edits": torch.tensor(self.n_edits), "rows": self.rows, "dense": self.dense}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned; an empty mapping means no past edit."""
        if not tensors:
            tensors = {"n_edits": torch.tensor(0), "rows": torch.zeros(0, self.d_ff)}

        self.n_edits = int(tensors["n_edits"])
        self.rows = tensors["rows"].to(self.device) if "rows" in tensors else None
        self.dense = tensors["dense"].to(self.device) if "dense" in tensors else None


class Solver(Protocol):
    """Solves the systems of one layer."""

    def solve(self, keys: Tensor, past: PastKeys, index: Tensor | None = None) -> Tensor:
        """X, (k, n_edits) float64, for keys (n_edits, d_ff) and the k neurons `index` (None = all d_ff)."""
        ...


class RidgeSolver:
    """Solves the ridge systems of one layer (MEMIT, Meng et al. 2023; NSE, Jiang et al. 2025).

    moment: second moment C, (d_ff, d_ff) float32; weight: its factor lambda > 0
    file: where the factor L is kept; None = in memory
    """

    def __init__(self, moment: Tensor, weight: float, file: FactorFile | None = None) -> None:
        self.moment, self.weight = moment, weight
        self.file = file
        self._factor: Tensor | None = None

    def solve(self, keys: Tensor, past: PastKeys, index: Tensor | None = None) -> Tensor:
        """X, (k, n_edits) float64, for keys (n_edits, d_ff) and the k neurons `index` (None = all d_ff).

        Raises NotPositiveDefinite."""
        if index is None and past.rows is not None:
            return self._solve_low_rank(keys.double(), past.rows.double())

        rows = keys if past.rows is None else torch.cat([past.rows, keys.float()])
        system = masked_gram(self.moment, self.weight, rows, past.dense, index)
        return self.solve_system(system, keys if index is None else keys[:, index])

    def solve_system(self, system: Tensor, keys: Tensor) -> Tensor:
        """X, (k, n_edits) float64, for a system matrix (k, k) and the keys (n_edits, k) of its k neurons.

        Raises NotPositiveDefinite."""
        return torch.cholesky_solve(keys.double().T, cholesky(system))

    def _solve_low_rank(self, keys: Tensor, past: Tensor) -> Tensor:
        """X, (d_ff, n_edits), with one factor of C per layer; all float64. past: (n_past, d_ff)"""
        factor = self._lower_factor()
        whitened = torch.linalg.solve_triangular(factor, torch.cat([past, keys]).T, upper=False)
        inner = whitened.T @ whitened
        inner.diagonal().add_(1)

        columns = torch.zeros(inner.shape[0], keys.shape[0], dtype=inner.dtype, device=inner.device)
        columns[past.shape[0] :].fill_diagonal_(1)
        combined = whitened @ torch.cholesky_solve(columns, cholesky(inner))
        return torch.linalg.solve_triangular(factor.T, combined, upper=True)

    def _lower_factor(self) -> Tensor:
        """L, (d_ff, d_ff) float64, computed once. Raises NotPositiveDefinite."""
        if self._factor is not None:
            return self._factor
        if self.file is not None and (kept := self.file.read()) is not None:
            return kept

        factor = _cholesky(self._weighted, in_place=True)
        if self.file is None:
            self._factor = factor
        else:
            self.file.keep(factor)
        return factor

    def _weighted(self) -> Tensor:
        """weight * C, (d_ff, d_ff) float64, its columns one after another as LAPACK wants them."""
        system = torch.empty(self.moment.shape, dtype=torch.float64, device=self.moment.device).T
        return system.copy_(self.moment).mul_(self.weight)


class FactorFile:
    """A factor on the disk, in a file without a name: it goes when the object or the process does.

    The factor is mapped into memory when it is read, so the system can take its pages back."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._shape: tuple[int, ...] = ()
        self._failed = False

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a copy computes its own factor."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def keep(self, factor: Tensor) -> None:
        """Write a factor (n, n) float64 whose columns stand one after another. A full disk is a warning, told once.

        On a GPU, where a factor is computed faster than it is read, nothing is written."""
        if self._failed or factor.device.type != "cpu":
            return

        try:
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  open as long as the object
            factor.T.numpy().tofile(self._file)
            self._file.flush()
            self._shape = tuple(factor.shape)
        except OSError as error:
            self._failed = True
            self._file = None
            log.warning(
                "a factor was not kept on the disk (%s): it is computed again in every round and batch; FASTEDIT_CACHE"
                " names another folder",
                told_by(error),
            )

    def read(self) -> Tensor | None:
        """The factor that was kept, (n, n) float64 on the CPU, mapped from the file; None if there is none."""
        if self._file is None:
            return None

        # Private pages: what is written into them never reaches the file.
        mapped = numpy.memmap(self._file, dtype=numpy.float64, mode="c", shape=self._shape)
        return torch.from_numpy(mapped).T


class NullSpaceSolver:
    """Solves the systems of one layer in the span of U, the null space of the background keys (AlphaEdit, Fang et al.
    2025).

    basis: U, (d_ff, rank) float64 with orthonormal columns; ridge: b > 0

    With G = U^T [past keys, keys]^T, (rank, n), the solution is X = U (G G^T + b I)^-1 G E. While n is below the rank,
    the equal X = U G (G^T G + b I)^-1 E is solved instead. Both systems are symmetric positive definite and neither is
    larger than the rank.
    """

    def __init__(self, basis: Tensor, ridge: float) -> None:
        self.basis = basis
        self.ridge = ridge

    def solve(self, keys: Tensor, past: PastKeys, index: Tensor | None = None) -> Tensor:
        """X, (d_ff, n_edits) float64, for keys (n_edits, d_ff).

        Raises NotPositiveDefinite, and ValueError for an index, since every neuron is written."""
        if index is not None:
            raise ValueError("a null-space system is solved for every neuron, got an index of neurons")

        new = self.basis.T @ keys.double().T
        if past.dense is not None:
            system = self.basis.T @ past.dense.double() @ self.basis + new @ new.T
        else:
            both = new if past.rows is None else torch.cat([self.basis.T @ past.rows.double().T, new], dim=1)
            if both.shape[1] < self.basis.shape[1]:
                return self._solve_low_rank(both, keys.shape[0])
            system = both @ both.T

        system.diagonal().add_(self.ridge)
        return self.basis @ torch.cholesky_solve(new, cholesky(system))

    def _solve_low_rank(self, both: Tensor, n_edits: int) -> Tensor:
        """X, (d_ff, n_edits), by a system of the number of edits. both: G, (rank, n), the last n_edits columns new"""
        inner = both.T @ both
        inner.diagonal().add_(self.ridge)

        columns = inner.new_zeros(inner.shape[0], n_edits)
        columns[-n_edits:].fill_diagonal_(1)
        return self.basis @ (both @ torch.cholesky_solve(columns, cholesky(inner)))


def cholesky(system: Tensor) -> Tensor:
    """Lower Cholesky factor of a symmetric matrix (n, n).

    Where the matrix is not positive definite in its precision, or so ill-conditioned that no digit of a solution would
    be right, a growing share of its mean diagonal is added to the diagonal, and the share is logged.
    Raises NotPositiveDefinite when the largest share is not enough.

    The condition number is bounded from below by the squared ratio of the factor's largest and smallest diagonal
    element."""
    return _cholesky(lambda: system, in_place=False)


def _cholesky(make: Callable[[], Tensor], in_place: bool) -> Tensor:
    """As `cholesky`, of the matrix that `make` returns.

    in_place: the factor takes the matrix's own memory; `make` has to return a new one each time, columns one after
        another"""
    system = make()
    n, dtype = system.shape[0], system.dtype
    scale = float(system.diagonal().mean())
    worst = 1 / torch.finfo(dtype).eps
    condition = float("nan")

    for jitter in JITTERS:
        if jitter:
            if in_place:
                # What is left of the one that was overwritten goes before the next is made.
                factor = system = system.new_empty(0)
            system = make() if in_place else make().clone()
            system.diagonal().add_(jitter * scale)

        factor, info = _factored(system, in_place)
        if int(info) != 0 or not _is_finite(factor):
            continue

        pivots = factor.diagonal()
        condition = float((pivots.max() / pivots.min()) ** 2) if len(pivots) else 1.0
        if condition < worst:
            if jitter:
                log.warning("system of size %d needed jitter %.0e of its mean diagonal", n, jitter)
            return factor

    raise NotPositiveDefinite(
        f"a system of size {n} is not positive definite, or its condition is beyond {dtype}, with"
        f" jitter up to {JITTERS[-1]:.0e} (mean diagonal {scale:.3g}, condition at least {condition:.3g});"
        " either the second moments were made of fewer tokens than d_ff (moments.tokens, --moment-tokens), or they or"
        " the keys are broken"
    )


def _factored(system: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
    """(factor, info) of `torch.linalg.cholesky_ex`."""
    if not in_place:
        return torch.linalg.cholesky_ex(system)

    info = torch.empty((), dtype=torch.int32, device=system.device)
    return torch.linalg.cholesky_ex(system, out=(system, info))


def _is_finite(matrix: Tensor) -> bool:
    """Whether all elements are finite, without a mask of the matrix's size."""
    return all(bool(torch.isfinite(matrix[:, start : start + 1024]).all()) for start in range(0, matrix.shape[1], 1024))
