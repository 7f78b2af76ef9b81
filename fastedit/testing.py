"""Inputs and tolerances for the tests and benchmarks of the ops: one input factory, one table of tolerances.

Products     error(result) <= 2 * error(torch's result in the same dtype) + floor, both against a float64 result
Solves       ||A X - B|| / (||A|| ||X|| + ||B||) <= floor
Selections   the index lists are equal
error = max |x - expected| / max |expected|. NaN or Inf anywhere fails.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Tolerance(NamedTuple):
    """How large an error may be, see the module.

    floor: allowed in addition to twice torch's error; ceiling: with a larger error of torch the comparison fails
    """

    floor: float
    ceiling: float


# By op and dtype of the result. A rounded result is off by up to one unit roundoff (2^-8 in bf16, 2^-11 in fp16).
TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    ("capture_keys", torch.float32): Tolerance(1e-6, 1e-5),
    ("capture_keys", torch.float64): Tolerance(1e-14, 1e-13),
    ("masked_gram", torch.float32): Tolerance(1e-6, 1e-5),
    ("masked_gram", torch.float64): Tolerance(1e-14, 1e-13),
    ("gram_update", torch.float32): Tolerance(1e-6, 1e-5),
    ("gram_update", torch.float64): Tolerance(1e-14, 1e-13),
    ("apply_delta", torch.float32): Tolerance(1e-6, 1e-5),
    ("apply_delta", torch.float64): Tolerance(1e-14, 1e-13),
    ("apply_delta", torch.bfloat16): Tolerance(2**-8, 2**-8 + 1e-5),
    ("apply_delta", torch.float16): Tolerance(2**-11, 2**-11 + 1e-5),
    ("sparse_adam", torch.float32): Tolerance(1e-6, 1e-5),
    ("sparse_adam", torch.float64): Tolerance(1e-14, 1e-13),
    ("score_neurons", torch.float32): Tolerance(1e-6, 1e-5),
    ("score_neurons", torch.float64): Tolerance(1e-14, 1e-13),
    ("sparse_delta", torch.float32): Tolerance(1e-6, 1e-5),
    ("sparse_delta", torch.float64): Tolerance(1e-14, 1e-13),
    ("sparse_delta", torch.bfloat16): Tolerance(2**-8, 2**-8 + 1e-5),
    ("sparse_delta", torch.float16): Tolerance(2**-11, 2**-11 + 1e-5),
    ("solve", torch.float32): Tolerance(1e-6, 1e-6),
    ("solve", torch.float64): Tolerance(1e-14, 1e-14),
}


def assert_close(result: Tensor, expected: Tensor, same_dtype: Tensor, op: str) -> None:
    """Check the error of a result against twice the error of torch's result in the same dtype.

    result, same_dtype: ours and torch's, of one shape and dtype; the dtype and `op` choose the tolerance
    expected: the float64 result, same shape
    Logs both errors on success. Raises AssertionError, for NaN or Inf too.
    """
    if result.dtype != same_dtype.dtype:
        raise AssertionError(f"{op}: result is {result.dtype}, wanted {same_dtype.dtype}")
    for name, value in (("result", result), ("torch's result", same_dtype)):
        if value.shape != expected.shape:
            raise AssertionError(f"{op}: {name} is {tuple(value.shape)}, wanted {tuple(expected.shape)}")

    tolerance = TOLERANCES[op, result.dtype]
    torch_error = relative_error(same_dtype, expected)
    if not torch_error <= tolerance.ceiling:
        raise AssertionError(f"{op}: torch's own error is {torch_error:.3g}, more than {tolerance.ceiling:.3g}")

    error = relative_error(result, expected)
    bound = _bound(expected, same_dtype, op)
    if not error <= bound:
        raise AssertionError(
            f"{op}: error {error:.3g} in {result.dtype}, at most {bound:.3g} (torch {torch_error:.3g})"
        )

    log.info("%s %s %s: error %.3g, torch %.3g", op, tuple(result.shape), result.dtype, error, torch_error)


def assert_solves(system: Tensor, solution: Tensor, right: Tensor) -> None:
    """Check a solution of A X = B by ||A X - B|| / (||A|| ||X|| + ||B||), computed in float64.

    system: A, (k, k); solution: X, (k, n), whose dtype chooses the tolerance; right: B, (k, n)
    Logs the error on success. Raises AssertionError.
    """
    a, x, b = in_float64((system, solution, right))
    size = a.norm() * x.norm() + b.norm()
    residual = float((a @ x - b).norm() / size) if size > 0 or not size.isfinite() else 0.0

    bound = TOLERANCES["solve", solution.dtype].floor
    if not residual <= bound:
        raise AssertionError(f"solve: residual {residual:.3g} in {solution.dtype}, at most {bound:.3g}")

    log.info("solve %s %s: residual %.3g", tuple(solution.shape), solution.dtype, residual)


def assert_same_indices(result: Tensor, expected: Iterable[int], op: str) -> None:
    """Check that a selection is int64 and holds the expected indices in their order. Raises AssertionError."""
    indices = list(expected)

    if result.dtype != torch.int64 or result.tolist() != indices:
        missing = sorted(set(indices) - set(result.tolist()))
        extra = sorted(set(result.tolist()) - set(indices))
        raise AssertionError(f"{op}: {result.dtype} indices; missing {missing[:9]}, extra {extra[:9]}, or out of order")

    log.info("%s: %d indices equal", op, len(indices))


def assert_tolerance_bites(result: Tensor, expected: Tensor, same_dtype: Tensor, op: str) -> None:
    """Check the tolerance itself: `result` must pass, and must fail if it is zeroed or if one element is broken.

    An element is broken by NaN, Inf, or a value past the bound. Arguments as for `assert_close`; `expected` must have
    an element that is not zero. Raises AssertionError.
    """
    assert_close(result, expected, same_dtype, op)

    push = 2 * _bound(expected, same_dtype, op) * float(expected.abs().max())
    broken = {"zeroed": torch.zeros_like(result)}
    for place in {0, result.numel() // 2, result.numel() - 1}:
        index = torch.unravel_index(torch.tensor(place), result.shape)
        for value in (float(expected[index]) + push, float(expected[index]) - push, float("nan"), float("inf")):
            broken[f"{value} at {place}"] = result.clone().index_put_(index, result.new_tensor(value))

    for name, wrong in broken.items():
        try:
            assert_close(wrong, expected, same_dtype, op)
        except AssertionError:
            continue
        raise AssertionError(f"{op}: the tolerance lets a broken result pass: {name}")


def relative_error(result: Tensor, expected: Tensor) -> float:
    """max |result - expected| / max |expected| in float64; NaN or Inf if either has one, 0 for empty tensors."""
    if expected.numel() == 0:
        return 0.0

    difference = (result.double().cpu() - expected.double().cpu()).abs().max()

    return float(difference / expected.double().cpu().abs().max().clamp_min(torch.finfo(torch.float64).tiny))


def _bound(expected: Tensor, same_dtype: Tensor, op: str) -> float:
    """The largest error that `assert_close` allows."""
    return 2 * relative_error(same_dtype, expected) + TOLERANCES[op, same_dtype.dtype].floor


@dataclass(frozen=True)
class Case:
    """Sizes of one test or benchmark.

    selected: number of neurons in the index, None = no index
    strided: whether every tensor is a non-contiguous slice of a wider one with NaN or impossible indices elsewhere
    optional: whether optional arguments other than the index are given
    """

    name: str
    n_edits: int
    d_ff: int
    d_model: int = 8
    n_templates: int = 3
    selected: int | None = None
    strided: bool = False
    optional: bool = True

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("tiny", 1, 1, d_model=1, n_templates=1, selected=1),
    Case("odd", 7, 61, d_model=13, n_templates=5, selected=23),
    Case("strided", 5, 34, d_model=6, selected=11, strided=True),
    Case("no_edits", 0, 9, selected=4),
    Case("none_selected", 3, 9, selected=0),
    Case("one_neuron", 3, 17, n_templates=1, selected=1),
    Case("every_neuron", 4, 33, d_model=5),
    Case("bare", 6, 40, d_model=11, optional=False),
    Case("smollm2", 24, 1536, d_model=576, n_templates=6, selected=700),
)


class CaptureInputs(NamedTuple):
    """Arguments of `capture_keys`; the activation goes between weights and active."""

    gate: Tensor
    up: Tensor | None
    weights: Tensor
    active: Tensor | None


class GramInputs(NamedTuple):
    """Arguments of `masked_gram`, in its order."""

    moment: Tensor
    weight: float
    keys: Tensor
    history: Tensor | None
    chosen: Tensor | None


class DeltaInputs(NamedTuple):
    """Arguments of `apply_delta`, in its order."""

    weight: Tensor
    residual: Tensor
    solution: Tensor
    chosen: Tensor | None
    master: Tensor | None


class AdamInputs(NamedTuple):
    """State and gradient of `sparse_adam`; every third row of delta and the moments is zero, as before step 1."""

    delta: Tensor
    grad: Tensor
    moment1: Tensor
    moment2: Tensor
    decay: Tensor | None
    radius: Tensor | None


class ScoreInputs(NamedTuple):
    """Arguments of `score_neurons`, in its order."""

    activations: Tensor
    weight: Tensor
    directions: Tensor


class SparseInputs(NamedTuple):
    """Arguments of `sparse_delta`, in its order, and the gradient of `sparse_delta_grads`."""

    activations: Tensor
    row_starts: Tensor
    chosen: Tensor
    slot_starts: Tensor
    delta: Tensor
    scale: float
    grad: Tensor


class Factory:
    """Seeded inputs of the ops for a case, made on the CPU and moved to `device`."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> None:
        self.case = case
        self.dtype = dtype
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def capture(self) -> CaptureInputs:
        """Rows of gate and up, uneven template weights that sum to 1, and every edit but each third active."""
        case = self.case
        shape = (case.n_edits, case.n_templates, case.d_ff)
        weights = self._uniform(case.n_templates) + 0.1
        active = torch.arange(case.n_edits) % 3 != 2
        return CaptureInputs(
            self._place(3 * self._normal(*shape)),
            self._place(self._normal(*shape)) if case.optional else None,
            self._place(weights / weights.sum(), torch.float32),
            self._place(active, torch.bool) if case.optional else None,
        )

    def score(self, ties: bool = False) -> Tensor:
        """Scores, (d_ff,), heavy-tailed like the mass of keys; with `ties`, of five values only."""
        mass = self._normal(self.case.d_ff).abs() ** 3
        return self._place((mass.clamp_max(2) * 2).round() if ties else mass)

    def gram(self) -> GramInputs:
        """Keys, the second moment and the history of others, lambda."""
        case = self.case
        return GramInputs(
            self._place(self._second_moment()),
            12.5,
            self._place(self._normal(case.n_edits, case.d_ff)),
            self._place(7 * self._second_moment()) if case.optional else None,
            self._index(),
        )

    def delta(self) -> DeltaInputs:
        """A weight in the dtype, its float32 master with the bits that the weight has lost, a float32 update."""
        case = self.case
        width = case.d_ff if case.selected is None else case.selected
        wide = self.dtype if self.dtype == torch.float64 else torch.float32
        master = self._normal(case.d_model, case.d_ff).to(wide)
        return DeltaInputs(
            self._place(master),
            self._place(self._normal(case.n_edits, case.d_model), wide),
            self._place(self._normal(width, case.n_edits) / max(case.n_edits, 1) ** 0.5, wide),
            self._index(),
            self._place(master, wide) if case.optional else None,
        )

    def adam(self) -> AdamInputs:
        """State in mid-run; the radius binds about half of the rows."""
        case = self.case
        shape = (case.n_edits, case.d_model)
        running = (torch.arange(case.n_edits) % 3 != 0).to(torch.float64)[:, None]
        delta = running * self._normal(*shape)
        norm = delta.norm(dim=1)
        return AdamInputs(
            self._place(delta),
            self._place(self._normal(*shape)),
            self._place(running * 0.1 * self._normal(*shape)),
            self._place(running * (0.001 + 0.01 * self._uniform(*shape))),
            self._place(0.5 * self._uniform(case.n_edits)) if case.optional else None,
            self._place((norm + 0.1) * (0.5 + self._uniform(case.n_edits))) if case.optional else None,
        )

    def scored(self, ties: bool = False) -> ScoreInputs:
        """A slot per edit, every fifth activation zero as behind a ReLU; with `ties`, small whole numbers only."""
        case = self.case
        shapes = (case.n_edits, case.d_ff), (case.d_model, case.d_ff), (case.n_edits, case.d_model)
        activations, weight, directions = (self._normal(*shape) for shape in shapes)
        activations[:, ::5] = 0
        if ties:
            activations, weight, directions = (part.round().clamp(-1, 1) for part in (activations, weight, directions))
        return ScoreInputs(self._place(activations), self._place(weight), self._place(directions))

    def sparse(self) -> SparseInputs:
        """A sample per edit, of 0 to 2 n_templates rows and 0 to 6 slots; every fourth slot names neuron 0 again."""
        case = self.case
        wide = self.dtype if self.dtype == torch.float64 else torch.float32
        # Where there are no columns, no slot can name one.
        mosts = 2 * case.n_templates, 6 if case.d_ff else 0
        rows, slots = (torch.randint(most + 1, (case.n_edits,), generator=self.generator) for most in mosts)
        n_rows, n_slots = int(rows.sum()), int(slots.sum())
        index = torch.randint(max(case.d_ff, 1), (n_slots,), generator=self.generator)
        index[::4] = 0
        zero = torch.zeros(1, dtype=torch.int64)
        return SparseInputs(
            self._place(self._normal(n_rows, case.d_ff)),
            self._place(torch.cat([zero, rows.cumsum(0)]), torch.int64),
            self._place(index, torch.int64),
            self._place(torch.cat([zero, slots.cumsum(0)]), torch.int64),
            self._place(self._normal(n_slots, case.d_model), wide),
            0.75 if case.optional else 1.0,
            self._place(self._normal(n_rows, case.d_model), wide),
        )

    def _index(self) -> Tensor | None:
        if self.case.selected is None:
            return None
        chosen = torch.randperm(self.case.d_ff, generator=self.generator)[: self.case.selected]
        return self._place(chosen.sort().values, torch.int64)

    def _second_moment(self) -> Tensor:
        d_ff = self.case.d_ff
        if d_ff <= 4096:
            rows = self._normal(d_ff // 2 + 3, d_ff)
            return rows.T @ rows / rows.shape[0]
        # At a real model's width: few rows and a diagonal, in float32, so that it takes a second and no third copy.
        rows = self._normal(128, d_ff).float()
        moment = rows.T @ rows / rows.shape[0]
        moment.diagonal().add_(0.5)
        return moment

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def _place(self, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        value = value.to(self.device, dtype or self.dtype, copy=True)
        return strided(value) if self.case.strided else value


def strided(value: Tensor) -> Tensor:
    """The same content as a view of every second element of a tensor with NaN, 2^40 or True elsewhere."""
    filler = float("nan") if value.is_floating_point() else 2**40 if value.dtype == torch.int64 else True
    wide = torch.full((*value.shape[:-1], 2 * value.shape[-1] + 1), filler, dtype=value.dtype, device=value.device)
    view = wide[..., 1::2]
    view.copy_(value)

    return view


def gaps(value: Tensor) -> Tensor:
    """The same content in rows that are five elements longer, filled with NaN; the last dimension is contiguous."""
    wide = value.new_full((*value.shape[:-1], value.shape[-1] + 5), float("nan"))

    return wide[..., : value.shape[-1]].copy_(value)


def in_float64(values: Iterable[Any]) -> tuple[Any, ...]:
    """CPU copies of tensors, floating-point ones in float64. Values that are not tensors are returned as they are."""
    return tuple(
        value.to("cpu", torch.float64 if value.is_floating_point() else value.dtype, copy=True)
        if isinstance(value, Tensor)
        else value
        for value in values
    )
