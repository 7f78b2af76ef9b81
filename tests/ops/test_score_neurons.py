"""score_neurons against the formula, neuron by neuron, and its best against the sorted scores."""

import pytest
import torch

from fastedit.ops import score_neurons as module
from fastedit.ops.score_neurons import best, score_neurons, score_neurons_ref
from fastedit.testing import CASES, Case, Factory, assert_close, assert_same_indices, assert_tolerance_bites, in_float64

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SMALL = Case("small", 4, 10, d_model=6)


def formula(activations, weight, directions):
    """The docstring's line, one neuron at a time."""
    activations, weight, directions = in_float64((activations, weight, directions))
    scores = torch.zeros(activations.shape, dtype=torch.float64)
    for slot in range(activations.shape[0]):
        for neuron in range(activations.shape[1]):
            along = (weight[:, neuron] * directions[slot]).sum()
            scores[slot, neuron] = activations[slot, neuron] * along
    return scores


def in_order(scores, k):
    """The k first of a list, descending, smallest index first among equals."""
    return sorted(range(len(scores)), key=lambda neuron: (-scores[neuron], neuron))[:k]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_follow_the_formula(case, dtype):
    inputs = Factory(case, dtype).scored()
    found = score_neurons(*inputs)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = formula(*inputs) if case.d_ff < 100 else score_neurons_ref(*in_float64(inputs))
    assert_close(found, expected, score_neurons_ref(*inputs), "score_neurons")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerance_bites(dtype):
    inputs = Factory(SMALL, dtype).scored()
    assert_tolerance_bites(score_neurons(*inputs), formula(*inputs), score_neurons_ref(*inputs), "score_neurons")


@pytest.mark.parametrize("k", [1, 5, 1000])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_best_are_the_first_of_the_sorted_scores(case, ties, k):
    inputs = Factory(case, torch.float64).scored(ties)
    k = min(k, case.d_ff)
    values, index = score_neurons(*inputs, top_k=k)
    assert values.shape == index.shape == (case.n_edits, k)
    scores = score_neurons_ref(*inputs)
    for slot in range(case.n_edits):
        # Whole numbers add up exactly, so that equal scores are equal however they were summed.
        assert_same_indices(index[slot], in_order(scores[slot].tolist(), k), "score_neurons")
    assert_close(values, scores.gather(1, index), scores.gather(1, index), "score_neurons")


def test_slots_beyond_one_block_are_scored_too(monkeypatch):
    inputs = Factory(Case("many", 11, 30), torch.float64).scored(ties=True)
    whole = score_neurons(*inputs, top_k=7)
    monkeypatch.setattr(module, "BLOCK", 3)
    for part, expected in zip(score_neurons(*inputs, top_k=7), whole, strict=True):
        assert torch.equal(part, expected)


def test_worked_example():
    activations = torch.tensor([[1.0, -2.0, 3.0], [1.0, 1.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0, 2.0], [5.0, 1.0, 0.0]])
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert score_neurons(activations, weight, directions).tolist() == [[1, 0, 6], [5, 1, 0]]
    values, index = score_neurons(activations, weight, directions, top_k=2)
    assert values.tolist() == [[6, 1], [5, 1]]
    assert index.tolist() == [[2, 0], [0, 1]]


def test_a_nan_comes_first_and_equals_behind_it_in_order():
    scores = torch.tensor([[1.0, float("nan"), 2.0, 2.0], [0.0, 3.0, 3.0, 3.0]])
    assert best(scores, 3).neurons.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert best(scores, 1).neurons.tolist() == [[1], [1]]


def test_inputs_are_left_alone():
    inputs = Factory(SMALL).scored()
    before = [value.clone() for value in inputs]
    score_neurons(*inputs)
    score_neurons(*inputs, top_k=2)
    for value, copy in zip(inputs, before, strict=True):
        assert torch.equal(value, copy)


@pytest.mark.parametrize(
    ("changes", "error", "argument"),
    [
        pytest.param({"weight": torch.zeros(10)}, ValueError, "weight must be", id="weight_1d"),
        pytest.param({"weight": torch.zeros(6, 10).int()}, TypeError, "weight must be", id="weight_int"),
        pytest.param({"activations": torch.zeros(4, 9)}, ValueError, "activations must be", id="too_narrow"),
        pytest.param({"activations": torch.zeros(4, 10).half()}, TypeError, "activations must be", id="mixed"),
        pytest.param({"directions": torch.zeros(3, 6)}, ValueError, "directions must be", id="too_few"),
        pytest.param({"directions": torch.zeros(4, 6).double()}, TypeError, "directions must be", id="double"),
        pytest.param({"top_k": 0}, ValueError, r"top_k must be in \[1, 10\], got 0", id="k_zero"),
        pytest.param({"top_k": 11}, ValueError, r"top_k must be in \[1, 10\], got 11", id="k_too_large"),
    ],
)
def test_wrong_arguments_are_named(changes, error, argument):
    with pytest.raises(error, match=f"score_neurons: {argument}"):
        score_neurons(**{**Factory(SMALL).scored()._asdict(), **changes})
