"""masked_gram against sums written out in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastedit.ops.masked_gram import masked_gram, masked_gram_ref
from fastedit.testing import CASES, Case, Factory, assert_close, assert_solves, assert_tolerance_bites, gaps, in_float64

DTYPES = (torch.float32, torch.float64)
SMALL = Case("small", 4, 10, selected=6)


def formula(moment, weight, keys, history, chosen):
    """A[i, j] = weight * C[s_i, s_j] + H[s_i, s_j] + sum over edits of key[s_i] * key[s_j], in float64."""
    moment, keys, history = in_float64((moment, keys, history))
    rows = torch.arange(keys.shape[1]) if chosen is None else chosen
    at = (rows[:, None], rows[None, :])
    gram = weight * moment[at]
    for key in keys:
        gram = gram + torch.outer(key, key)[at]
    return gram if history is None else gram + history[at]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_system_matrix_follows_the_formula(case, dtype, backend, device, nan_scratch):
    inputs = Factory(case, device=device).gram()
    found = masked_gram(*inputs, dtype=dtype)
    assert found.dtype == dtype
    assert_close(found, formula(*inputs), masked_gram_ref(*inputs, dtype=dtype), "masked_gram")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerance_of_the_system_matrix_bites(dtype, backend, device):
    inputs = Factory(SMALL, device=device).gram()
    found = masked_gram(*inputs, dtype=dtype)
    assert_tolerance_bites(found, formula(*inputs), masked_gram_ref(*inputs, dtype=dtype), "masked_gram")


def test_float64_is_the_default_and_sums_are_taken_in_it(backend):
    keys = torch.tensor([[1.0], [2.0**-13]])
    found = masked_gram(torch.zeros(1, 1), 1.0, keys)
    assert found.dtype == torch.float64
    assert found.item() == 1 + 2.0**-26


@pytest.mark.parametrize("wrong", [-1, 10])
def test_an_index_out_of_range_is_an_error(wrong, backend):
    moment, weight, keys, history, _ = Factory(SMALL).gram()
    with pytest.raises(IndexError):
        masked_gram(moment, weight, keys, history, torch.tensor([0, wrong]))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), d_ff=st.integers(1, 24), n_edits=st.integers(0, 5), optional=st.booleans())
def test_any_ascending_index_takes_its_rows_and_columns(data, d_ff, n_edits, optional, backend):
    chosen = torch.tensor(sorted(data.draw(st.sets(st.integers(0, d_ff - 1)))), dtype=torch.int64)
    moment, weight, keys, history, _ = Factory(Case("drawn", n_edits, d_ff, optional=optional)).gram()
    inputs = (moment, weight, keys, history, chosen)
    found = masked_gram(*inputs)
    assert_close(found, formula(*inputs), found, "masked_gram")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("runs", [1, 4, 31, 32, 33, 34, 48, 64])
def test_a_tile_of_columns_in_any_number_of_runs_is_gathered_whole(runs, dtype, backend):
    """A tile has 64 columns; the AVX-512 form keeps a list of its runs of 16 neighbours, which has 32 places."""
    first = [20 * run for run in range(runs)]
    rest = [20 * run + step for step in range(1, 16) for run in range(runs)]
    chosen = sorted(first + rest[: 64 - runs] + [20 * 64 + step for step in range(max(0, 64 - 16 * runs))])
    assert len(chosen) == 64
    moment, weight, keys, history, _ = Factory(Case("runs", 3, 20 * 64 + 64)).gram()
    inputs = (moment, weight, keys, history, torch.tensor(chosen))
    found = masked_gram(*inputs, dtype=dtype)
    assert_close(found, formula(*inputs), masked_gram_ref(*inputs, dtype=dtype), "masked_gram")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("selected", [50, None], ids=["some", "all"])
def test_rows_with_gaps_are_read_at_their_stride(selected, dtype, backend, device):
    inputs = Factory(Case("gaps", 5, 80, selected=selected), device=device).gram()
    expected = masked_gram(*inputs, dtype=dtype)
    gapped = [
        gaps(value) if name in ("moment", "history", "keys") else value for name, value in inputs._asdict().items()
    ]
    assert torch.equal(masked_gram(*gapped, dtype=dtype), expected)


@pytest.mark.parametrize("selected", [6, None])
def test_the_arguments_are_left_alone(selected, backend, device):
    inputs = Factory(Case("small", 4, 10, selected=selected), torch.float64, device).gram()
    before = in_float64(inputs)
    masked_gram(*inputs)
    for value, copy in zip(inputs, before, strict=True):
        assert torch.equal(value.cpu(), copy) if isinstance(value, torch.Tensor) else value == copy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_its_systems_are_solved_to_a_small_residual(dtype, backend, device):
    inputs = Factory(Case("system", 20, 64, selected=40), device=device).gram()
    system = masked_gram(*inputs, dtype=dtype)
    right = inputs.keys[:, inputs.chosen].T.to(dtype)
    solution = torch.cholesky_solve(right, torch.linalg.cholesky(system))
    assert_solves(system, solution, right)
    push = torch.zeros_like(solution)
    push[3, 3] = 1e-3 * solution.abs().max()
    for wrong in (torch.zeros_like(solution), solution + push, solution * float("nan"), solution / 0):
        with pytest.raises(AssertionError, match="residual"):
            assert_solves(system, wrong, right)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        pytest.param({"keys": torch.zeros(10)}, "keys", id="keys_1d"),
        pytest.param({"keys": torch.zeros(2, 9)}, "moment", id="keys_narrow"),
        pytest.param({"moment": torch.zeros(10, 9)}, "moment", id="moment_not_square"),
        pytest.param({"history": torch.zeros(9, 9)}, "history", id="history_narrow"),
        pytest.param({"index": torch.zeros(2, 2, dtype=torch.int64)}, "index", id="index_2d"),
    ],
)
def test_wrong_arguments_of_the_system_matrix_are_named(changes, argument):
    moment, weight, keys, history, chosen = Factory(SMALL).gram()
    arguments = {"moment": moment, "weight": weight, "keys": keys, "history": history, "index": chosen, **changes}
    with pytest.raises(ValueError, match=f"masked_gram: {argument} must be"):
        masked_gram(**arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 7, 33, 100, 513])
def test_the_system_matrix_is_symmetric_bit_for_bit(width, dtype, backend):
    generator = torch.Generator().manual_seed(width)
    for n_edits in (3, 24, 257):
        keys = torch.randn(n_edits, width, generator=generator, dtype=dtype)
        found = masked_gram(torch.eye(width), 1.0, keys, dtype=dtype)
        assert torch.equal(found, found.T)
