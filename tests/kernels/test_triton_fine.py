"""The Triton kernels of FiNE and KNE, under Triton's interpreter (or on the device, where there is one)."""

import pytest
import torch

from fastedit.ops import _dispatch
from fastedit.ops.score_neurons import score_neurons, score_neurons_ref
from fastedit.ops.sparse_delta import sparse_delta, sparse_delta_grads, sparse_delta_ref
from fastedit.testing import CASES, Case, Factory, assert_close, assert_tolerance_bites, in_float64

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ENSEMBLE = Case("ensemble", 1, 50, d_model=70, n_templates=20)


@pytest.fixture(autouse=True)
def on_triton():
    with _dispatch.backend("triton"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES[:-1], Case("wide_tiles", 40, 70, d_model=37)], ids=str)
def test_scores_are_those_of_the_definition(case, dtype):
    inputs = Factory(case, dtype, DEVICE).scored()
    assert_close(
        score_neurons(*inputs), score_neurons_ref(*in_float64(inputs)), score_neurons_ref(*inputs), "score_neurons"
    )


def test_the_tolerance_of_the_scores_bites():
    inputs = Factory(Case("small", 4, 10, d_model=6), device=DEVICE).scored()
    expected = score_neurons_ref(*in_float64(inputs))
    assert_tolerance_bites(score_neurons(*inputs), expected, score_neurons_ref(*inputs), "score_neurons")


@pytest.mark.parametrize("k", [1, 7, 1000])
@pytest.mark.parametrize("case", [*CASES[:-1], Case("wide_tiles", 3, 200, d_model=5)], ids=str)
def test_the_best_are_the_first_of_the_sorted_scores(case, k):
    # Whole numbers add up exactly, so that equal scores are equal however they were summed.
    inputs = Factory(case, device=DEVICE).scored(ties=True)
    k = min(k, case.d_ff)
    values, neurons = score_neurons(*inputs, top_k=k)
    expected = score_neurons_ref(*inputs, top_k=k)
    assert neurons.dtype == torch.int64
    assert torch.equal(values, expected.values)
    assert torch.equal(neurons, expected.neurons)


def test_a_broken_score_ranks_first_and_both_zeros_are_one():
    directions, weight = torch.ones(1, 1, device=DEVICE), torch.ones(1, 6, device=DEVICE)
    activations = torch.tensor([[1.0, -0.0, float("nan"), 0.0, -1.0, float("inf")]], device=DEVICE)
    values, neurons = score_neurons(activations, weight, directions, top_k=6)
    assert neurons.tolist() == [[2, 5, 0, 1, 3, 4]]
    assert values[0, 0].isnan()
    assert values[0, 1:].tolist() == [float("inf"), 1, 0, 0, -1]


def test_the_best_of_float64_scores_are_refused_with_the_reason():
    inputs = Factory(Case("small", 4, 10), torch.float64, DEVICE).scored()
    with pytest.raises(_dispatch.BackendUnavailable, match="float64 score and its neuron do not fit the 64 bits"):
        score_neurons(*inputs, top_k=2)


def torch_result(inputs):
    """The definition in the dtype of delta, with autograd's gradients, rounded once."""
    delta = inputs.delta.clone().requires_grad_()
    activations = inputs.activations.to(delta.dtype, copy=True).requires_grad_()
    y = sparse_delta_ref(activations, *inputs[1:4], delta, inputs.scale)
    of_activations, of_delta = torch.autograd.grad(y, (activations, delta), inputs.grad)
    return y.detach(), of_activations.to(inputs.activations.dtype), of_delta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES[:-1], ENSEMBLE, Case("many", 40, 9, d_model=3)], ids=str)
def test_changed_columns_and_their_gradients_are_those_of_the_definition(case, dtype):
    inputs = Factory(case, dtype, DEVICE).sparse()
    found = (sparse_delta(*inputs[:-1]), *sparse_delta_grads(*inputs))
    wide = type(inputs)(*in_float64(inputs))
    for value, expected, yardstick in zip(found, torch_result(wide), torch_result(inputs), strict=True):
        assert_close(value, expected, yardstick, "sparse_delta")


def test_samples_without_rows_or_slots_and_columns_named_twice_are_summed_rightly():
    generator = torch.Generator().manual_seed(2)
    activations, delta = torch.randn(40, 6, generator=generator), torch.randn(9, 5, generator=generator)
    row_starts, slot_starts = torch.tensor([0, 0, 17, 17, 30, 30, 40]), torch.tensor([0, 2, 2, 5, 9, 9, 9])
    index = torch.tensor([0, 1, 2, 3, 4, 5, 5, 1, 0])
    grad = torch.randn(40, 5, generator=generator)
    arguments = [value.to(DEVICE) for value in (activations, row_starts, index, slot_starts, delta)]
    found = sparse_delta(*arguments, 2.0)
    of_activations, of_delta = sparse_delta_grads(*arguments, 2.0, grad.to(DEVICE))
    assert not found[:17].any()
    assert not found[30:].any()
    assert not of_delta[:5].any()
    leaves = [value.double().requires_grad_() for value in (arguments[0], arguments[4])]
    y = sparse_delta_ref(leaves[0], *arguments[1:4], leaves[1], 2.0)
    expected = torch.autograd.grad(y, leaves, grad.double().to(DEVICE))
    assert_tolerance_bites(found, y.detach(), found, "sparse_delta")
    assert_tolerance_bites(of_activations, expected[0], of_activations, "sparse_delta")
    assert_tolerance_bites(of_delta, expected[1], of_delta, "sparse_delta")


def test_training_runs_through_the_kernels():
    inputs = Factory(Case("trained", 4, 12, d_model=6), device=DEVICE).sparse()
    delta = inputs.delta.clone().requires_grad_()
    sparse_delta(*inputs[:4], delta, inputs.scale).square().sum().backward()
    y = torch_result(inputs)[0]
    expected = sparse_delta_grads(*inputs[:6], 2 * y).delta
    assert_close(delta.grad, expected.double(), expected, "sparse_delta")
