"""gram_update against sums written out in float64."""

import pytest
import torch

from fastedit.ops.gram_update import gram_update, gram_update_ref
from fastedit.testing import CASES, Factory, assert_close, assert_tolerance_bites, gaps, in_float64, strided

DTYPES = (torch.float32, torch.float64)


def formula(history, keys):
    """H[i, j] + sum over edits of key[i] * key[j], in float64."""
    history, keys = in_float64((history, keys))
    for key in keys:
        history = history + torch.outer(key, key)
    return history


def symmetric(width, dtype=torch.float32, seed=0):
    rows = torch.randn(5, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    sums = rows.T @ rows
    return (sums + sums.T) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_history_grows_by_the_products_of_the_keys(case, dtype, backend, device):
    history, _, keys, _, _ = Factory(case, dtype, device).gram()
    history.copy_((history + history.T) / 2)
    expected, torch_result = formula(history, keys), gram_update_ref(history, keys)
    assert gram_update(history, keys) is history
    assert_close(history, expected, torch_result, "gram_update")


@pytest.mark.parametrize("spread", [lambda tensor: tensor, strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize("width", [1, 2, 511, 512, 513, 1100])
def test_every_tile_is_written_once_at_any_width(width, spread, backend):
    history = spread(symmetric(width))
    keys = spread(torch.randn(3, width, generator=torch.Generator().manual_seed(1)))
    expected, torch_result = formula(history, keys), gram_update_ref(history, keys)
    gram_update(history, keys)
    assert_tolerance_bites(history, expected, torch_result, "gram_update")
    mirrored = history.T
    assert_close(mirrored, expected, history, "gram_update")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 64, 150, 600])
def test_a_history_of_longer_rows_grows_in_place_and_its_gaps_are_left_alone(width, dtype, backend, device):
    history = symmetric(width, dtype).to(device)
    keys = torch.randn(3, width, dtype=dtype, generator=torch.Generator().manual_seed(1)).to(device)
    gapped = gaps(history)
    assert gapped.stride() == (width + 5, 1)
    gram_update(history, keys)
    gram_update(gapped, gaps(keys))
    assert torch.equal(gapped, history)
    assert gapped._base is not None
    assert gapped._base[:, width:].isnan().all()


def test_the_upper_tiles_are_taken_from_the_lower(backend):
    history = torch.zeros(1100, 1100)
    history[:512, 512:] = float("nan")
    gram_update(history, torch.ones(2, 1100))
    assert torch.equal(history, torch.full((1100, 1100), 2.0))


def test_a_million_rows_in_batches_stay_at_the_float64_sum(backend):
    generator = torch.Generator().manual_seed(0)
    history, exact = torch.zeros(48, 48), torch.zeros(48, 48, dtype=torch.float64)
    mean = torch.randn(48, generator=generator)
    for _ in range(1_000_000 // 4096 + 1):
        keys = torch.randn(4096, 48, generator=generator) + mean
        gram_update(history, keys)
        exact.addmm_(keys.double().T, keys.double())
    assert float((history.double() - exact).norm() / exact.norm()) <= 1e-5


def test_the_keys_are_left_alone(backend):
    keys = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    before = keys.clone()
    gram_update(symmetric(20), keys)
    assert torch.equal(keys, before)


@pytest.mark.parametrize(
    ("history", "keys", "error", "argument"),
    [
        pytest.param(torch.zeros(3, 4), torch.zeros(2, 4), ValueError, "history", id="not_square"),
        pytest.param(torch.zeros(4, 4), torch.zeros(4), ValueError, "keys", id="keys_1d"),
        pytest.param(torch.zeros(4, 4), torch.zeros(2, 5), ValueError, "history", id="keys_wide"),
        pytest.param(torch.zeros(4, 4), torch.zeros(2, 4).double(), TypeError, "keys", id="mixed"),
    ],
)
def test_wrong_arguments_of_the_history_are_named(history, keys, error, argument):
    with pytest.raises(error, match=f"gram_update: {argument} must be"):
        gram_update(history, keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 7, 33, 100, 511, 512, 513, 1100])
def test_the_history_stays_symmetric_bit_for_bit(width, dtype, backend):
    history = torch.zeros(width, width, dtype=dtype)
    generator = torch.Generator().manual_seed(width)
    for n_rows in (3, 24, 257):
        gram_update(history, torch.randn(n_rows, width, generator=generator, dtype=dtype))
        assert torch.equal(history, history.T)
