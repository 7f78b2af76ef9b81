"""The systems of the closed-form updates; keys row per edit, X column per edit.

RidgeSolver:      (weight * C + H + K^T K)[S, S] X = K_S^T           (MEMIT, NSE)
NullSpaceSolver:  (P (K^T K + H) + ridge I) X = P K^T, P = U U^T     (AlphaEdit)

Past edits stand as their keys while these are fewer than half the neurons, and as the dense sum H afterwards.
With every neuron selected and past keys as rows, the Cholesky factor L of weight * C is made once per layer and
    X = L^-T U (I + U^T U)^-1 E,   U = L^-1 [past keys, keys]^T,   E the columns of this batch
(Woodbury), so no d_ff x d_ff system is ever factored again. All in float64: C has a long tail of small eigenvalues.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fastedit.ops.gram_update import gram_update
from fastedit.ops.masked_gram import masked_gram

log = logging.getLogger(__name__)

JITTERS = (0.0, 1e-12, 1e-10, 1e-8)


class NotPositiveDefinite(ValueError):
    """A system could not be factored even with the largest jitter: the second moment or a key is broken."""


class PastKeys:
    """Keys of all committed edits of one layer: rows while few, their sum of outer products H after."""

    def __init__(self, d_ff: int, device: torch.device | str = "cpu") -> None:
        self.n_edits, self.d_ff, self.device = 0, d_ff, device
        self.rows: Tensor | None = torch.zeros(0, d_ff, device=device)
        self.dense: Tensor | None = None

    def add(self, keys: Tensor) -> None:
        """Append keys (n, d_ff)."""
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
        """All of it, for `load`: a count, and either the rows or their dense sum, to which `add` adds in place."""
        held = {"n_edits": torch.tensor(self.n_edits), "rows": self.rows, "dense": self.dense}
        return {name: each for name, each in held.items() if each is not None}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Become what `tensors` returned; nothing = without a past edit."""
        none = torch.zeros(0, self.d_ff, device=self.device)
        held = tensors or {"n_edits": torch.tensor(0), "rows": none}
        self.n_edits = int(held["n_edits"])
        self.rows, self.dense = (held[n].to(self.device) if n in held else None for n in ("rows", "dense"))


class Solver(Protocol):
    """What a recipe needs of one layer's systems."""

    def solve(self, keys: Tensor, past: PastKeys, index: Tensor | None = None) -> Tensor:
        """X, (k, n_edits) float64, for keys (n_edits, d_ff) on the neurons `index` (None = all)."""
        ...


class RidgeSolver:
    """Solves one layer's systems.

    moment: (d_ff, d_ff) second moment C; weight: its factor lambda > 0
    """

    def __init__(self, moment: Tensor, weight: float) -> None:
        self.moment, self.weight = moment, weight
        self._factor: Tensor | None = None

    def solve(self, keys: Tensor, past: PastKeys, index: Tensor | None = None) -> Tensor:
        """X, (k, n_edits) float64, for keys (n_edits, d_ff) on the neurons `index` (None = all).

        Raises NotPositiveDefinite."""
        if index is None and past.rows is not None:
            return self._solve_low_rank(keys.double(), past.rows.double())
        rows = keys if past.rows is None else torch.cat([past.rows, keys.float()])
        system = masked_gram(self.moment, self.weight, rows, past.dense, index)
        return self.solve_system(system, keys if index is None else keys[:, index])

    def solve_system(self, system: Tensor, keys: Tensor) -> Tensor:
        """X, (k, n_edits) float64, for a system matrix (k, k) and the keys (n_edits, k) on its neurons.

        Raises NotPositiveDefinite."""
        return torch.cholesky_solve(keys.double().T, cholesky(system))

    def _solve_low_rank(self, keys: Tensor, past: Tensor) -> Tensor:
        if self._factor is None:
            self._factor = cholesky(self.weight * self.moment.double())
        whitened = torch.linalg.solve_triangular(self._factor, torch.cat([past, keys]).T, upper=False)
        inner = whitened.T @ whitened
        inner.diagonal().add_(1)
        columns = torch.zeros(inner.shape[0], keys.shape[0], dtype=inner.dtype, device=inner.device)
        columns[past.shape[0] :].fill_diagonal_(1)
        combined = whitened @ torch.cholesky_solve(columns, cholesky(inner))
        return torch.linalg.solve_triangular(self._factor.T, combined, upper=True)


class NullSpaceSolver:
    """Solves one layer's systems inside the span of U, the null space of the background keys.

    basis: U, (d_ff, rank) float64 with orthonormal columns; ridge: b > 0
    With G = U^T [past keys, keys]^T, (rank, n), the solution is U (G G^T + b I)^-1 G E, and while n is below the rank
    the equal U G (G^T G + b I)^-1 E: no d_ff x d_ff system, and none that is not symmetric positive definite."""

    def __init__(self, basis: Tensor, ridge: float) -> None:
        self.basis, self.ridge = basis, ridge

    def solve(self, keys: Tensor, past: PastKeys, index: Tensor | None = None) -> Tensor:
        """X, (d_ff, n_edits) float64. Raises NotPositiveDefinite; ValueError for an index: every neuron is written."""
        if index is not None:
            raise ValueError("a null-space system is solved for every neuron, got an index of neurons")
        rank = self.basis.shape[1]
        new = self.basis.T @ keys.double().T
        if past.dense is not None:
            system = self.basis.T @ past.dense.double() @ self.basis + new @ new.T
        else:
            both = new if past.rows is None else torch.cat([self.basis.T @ past.rows.double().T, new], dim=1)
            if both.shape[1] < rank:
                inner = both.T @ both
                inner.diagonal().add_(self.ridge)
                columns = inner.new_zeros(inner.shape[0], keys.shape[0])
                columns[-keys.shape[0] :].fill_diagonal_(1)
                return self.basis @ (both @ torch.cholesky_solve(columns, cholesky(inner)))
            system = both @ both.T
        system.diagonal().add_(self.ridge)
        return self.basis @ torch.cholesky_solve(new, cholesky(system))


def cholesky(system: Tensor) -> Tensor:
    """Lower Cholesky factor of a symmetric (n, n) matrix; a growing share of the mean diagonal is added when it is
    not positive definite in its precision, or so ill-conditioned that no digit of a solution is right, and the share is
    logged. Raises NotPositiveDefinite.

    The condition is bounded from below by the squared ratio of the factor's largest and smallest diagonal element."""
    scale = float(system.diagonal().mean())
    worst = 1 / torch.finfo(system.dtype).eps
    condition = float("nan")
    for jitter in JITTERS:
        shifted = system
        if jitter:
            shifted = system.clone()
            shifted.diagonal().add_(jitter * scale)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) != 0 or not bool(torch.isfinite(factor).all()):
            continue
        pivots = factor.diagonal()
        condition = float((pivots.max() / pivots.min()) ** 2) if len(pivots) else 1.0
        if condition < worst:
            if jitter:
                log.warning("system of size %d needed jitter %.0e of its mean diagonal", system.shape[0], jitter)
            return factor
    raise NotPositiveDefinite(
        f"a system of size {system.shape[0]} is not positive definite, or its condition is beyond {system.dtype}, with"
        f" jitter up to {JITTERS[-1]:.0e} (mean diagonal {scale:.3g}, condition at least {condition:.3g}); the second"
        " moments or the keys are broken"
    )
