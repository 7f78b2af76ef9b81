"""The costs that bench/score_neurons.py and bench/sparse_delta.py claim, counted by hand."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from fastedit.testing import Case

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    """Imports modules of bench/ by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        yield importlib.import_module


def setting(bench, **options):
    return bench("measure").Setting("smollm2-135m", Case("small", 2, 32), torch.float32, "", options)


def test_costs_of_the_scores(bench):
    """2 slots, W of 3 by 5, the five best of each."""
    given = (torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(2, 3), 5)
    cost = bench("score_neurons").cost(setting(bench), given, "cpu")
    # 10 activations, 15 weights, 6 of the directions; 10 values with their indices; 10 scores of 2 * 3 + 1
    assert (cost.bytes, cost.flops) == (4 * (10 + 15 + 6) + 10 * 12, 70)


def test_costs_of_the_sparse_columns(bench):
    """Two samples: two rows with columns 0 and 1, one row with column 20; 4 components."""
    starts, index = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 20])
    given = (torch.zeros(3, 32), starts, index, starts, torch.zeros(3, 4), 1.0)
    cost = bench("sparse_delta").cost(setting(bench), given, "cpu")
    # one line of each row; 12 of the vectors, 12 of the sum; 2 * 2 + 1 pairs
    assert (cost.bytes, cost.flops) == (3 * 64 + 2 * 4 * 12, 2 * 5 * 4)
    cost = bench("sparse_delta").cost(setting(bench, gradients=True), (*given, torch.zeros(3, 4)), "cpu")
    # beside the lines, vectors and their gradient, the gradient of the sum, and of every activation
    assert (cost.bytes, cost.flops) == (3 * 64 + 3 * 4 * 12 + 4 * 3 * 32, 2 * 2 * 5 * 4)
