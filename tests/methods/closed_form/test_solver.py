"""Linear systems: the low-rank forms against the dense solve, selected neurons, jitter, past keys."""

from __future__ import annotations

import logging

import pytest
import torch

from fastedit.methods.closed_form.solver import NotPositiveDefinite, NullSpaceSolver, PastKeys, RidgeSolver, cholesky

D_FF = 60


def moment(seed: int = 0, condition: float = 1e6) -> torch.Tensor:
    """A second moment with a long tail of small eigenvalues, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(D_FF, D_FF, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), D_FF, dtype=torch.float64)
    return ((basis * spectrum) @ basis.T).float()


def keys(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D_FF, generator=torch.Generator().manual_seed(seed))


def backward_error(system: torch.Tensor, solution: torch.Tensor, wanted: torch.Tensor) -> float:
    scale = system.norm() * solution.norm() + wanted.norm()
    return float((system @ solution - wanted).norm() / scale)


@pytest.mark.parametrize("n_past", [0, 7, 30, 31, 200], ids=lambda n: f"{n} past edits")
@pytest.mark.parametrize("share", [None, 0.4], ids=["all neurons", "selected"])
def test_solution_solves_the_dense_system(n_past: int, share: float | None) -> None:
    solver = RidgeSolver(moment(), 50.0)
    past, batch = PastKeys(D_FF), keys(5)
    old = keys(n_past, seed=2)
    for start in range(0, n_past, 9):
        past.add(old[start : start + 9])
    assert (past.rows is None) == (n_past > D_FF // 2)

    index = None if share is None else torch.arange(0, D_FF, 3)
    solution = solver.solve(batch, past, index)
    chosen = torch.arange(D_FF) if index is None else index
    dense = 50.0 * moment().double() + old.double().T @ old.double() + batch.double().T @ batch.double()
    system, wanted = dense[chosen][:, chosen], batch.double()[:, chosen].T

    assert solution.shape == (len(chosen), 5)
    assert backward_error(system, solution, wanted) < 1e-6
    exact = torch.linalg.solve(system, wanted)
    assert float((solution - exact).norm() / exact.norm()) < 1e-4
    assert backward_error(system, torch.zeros_like(solution), wanted) > 0.5, "zeros must fail the same yardstick"


def test_past_keys_restore_bit_for_bit() -> None:
    past = PastKeys(D_FF)
    past.add(keys(20))
    first, rows = past.tensors(), past.rows.clone()
    past.add(keys(20, seed=3))
    assert past.rows is None
    assert past.n_edits == 40

    dense = past.dense.clone()
    second = {**past.tensors(), "dense": dense.clone()}
    past.add(keys(5, seed=4))
    past.load(second)
    assert past.n_edits == 40
    assert torch.equal(past.dense, dense)

    past.load(first)
    assert past.n_edits == 20
    assert past.dense is None
    assert torch.equal(past.rows, rows)


def test_jitter_grows_until_the_system_factors_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    half = torch.randn(40, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    singular = half @ half.T - 1e-11 * torch.eye(40, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        factor = cholesky(singular)
    assert "jitter" in caplog.text
    assert float((factor @ factor.T - singular).norm() / singular.norm()) < 1e-6


@pytest.mark.parametrize("broken", [-1.0, float("nan")], ids=["negative", "nan"])
def test_hopeless_system_is_refused(broken: float) -> None:
    system = torch.eye(8, dtype=torch.float64)
    system[3, 3] = broken
    with pytest.raises(NotPositiveDefinite, match="size 8"):
        cholesky(system)


def test_a_moment_of_too_few_tokens_is_named_as_the_cause() -> None:
    few = torch.randn(10, D_FF, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NotPositiveDefinite, match="made of fewer tokens than d_ff"):
        RidgeSolver(few.T @ few, 100).solve(few[:2], PastKeys(D_FF))


@pytest.mark.parametrize("n_past", [0, 7, 25, 200], ids=lambda n: f"{n} past edits")
@pytest.mark.parametrize("rank", [10, 40], ids=lambda rank: f"rank {rank}")
def test_null_space_solution_is_alphaedits(n_past: int, rank: int) -> None:
    """Both forms, and the dense history, against (P (K^T K + H) + b I) X = P K^T."""
    vectors = torch.linalg.eigh(moment(condition=1e3).double()).eigenvectors
    basis, ridge = vectors[:, :rank], 0.5
    past, batch, old = PastKeys(D_FF), keys(5), keys(n_past, seed=2)
    for start in range(0, n_past, 9):
        past.add(old[start : start + 9])
    solution = NullSpaceSolver(basis, ridge).solve(batch, past)

    project = basis @ basis.T
    gram = old.double().T @ old.double() + batch.double().T @ batch.double()
    system, wanted = project @ gram + ridge * torch.eye(D_FF), project @ batch.double().T
    exact = torch.linalg.solve(system, wanted)

    assert solution.shape == (D_FF, 5)
    assert backward_error(system, solution, wanted) < 1e-6
    assert float((solution - exact).norm() / exact.norm()) < 1e-5
    assert backward_error(system, torch.zeros_like(solution), wanted) > 0.5, "zeros must fail the same yardstick"

    with pytest.raises(ValueError, match="every neuron"):
        NullSpaceSolver(basis, ridge).solve(batch, past, torch.arange(3))
