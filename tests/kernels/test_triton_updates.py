"""The Triton kernels that change their arguments, under Triton's interpreter (or on the device, where there is one)."""

import pytest
import torch

from fastedit.ops import _dispatch
from fastedit.ops.apply_delta import apply_delta, apply_delta_ref
from fastedit.ops.gram_update import gram_update, gram_update_ref
from fastedit.ops.sparse_adam import AdamSettings, sparse_adam, sparse_adam_ref
from fastedit.testing import CASES, Case, Factory, assert_close, assert_tolerance_bites, in_float64

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDE = (torch.float32, torch.float64)
WEIGHTS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SETTINGS = AdamSettings(0.1, beta1=0.8, eps=1e-6)


@pytest.fixture(autouse=True)
def on_triton():
    with _dispatch.backend("triton"):
        yield


def copies(values):
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in values]


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_a_weight_and_its_master_take_the_update_and_are_rounded_once(case, dtype):
    weight, residual, solution, index, master = Factory(case, dtype, DEVICE).delta()
    found, found_master = copies((weight, master))
    apply_delta(found, residual, solution, index, found_master)
    base = weight if master is None else master
    expected = apply_delta_ref(*in_float64((base, residual, solution)), index)
    yardstick = apply_delta_ref(base, residual, solution, index)
    if master is not None:
        assert_close(found_master, expected, yardstick, "apply_delta")
    changed = slice(None) if index is None else index
    assert_close(found[:, changed], expected[:, changed], yardstick[:, changed].to(dtype), "apply_delta")
    if index is not None:
        others = torch.ones(weight.shape[1], dtype=torch.bool, device=DEVICE)
        others[index] = False
        assert torch.equal(found[:, others], weight[:, others])


def repeated_update(dtype):
    """100 positions in no order over 40 neurons; neuron 7 three times."""
    generator = torch.Generator().manual_seed(5)
    index = torch.randint(8, 40, (100,), generator=generator)
    index[[3, 60, 99]] = 7
    weight, residual, solution = (torch.randn(*shape, generator=generator) for shape in ((70, 40), (5, 70), (100, 5)))
    return [value.to(DEVICE) for value in (weight.to(dtype), residual, solution, index)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeated_positions_add_up_in_a_fixed_order(dtype):
    weight, residual, solution, index = repeated_update(dtype)
    found, again = copies((weight, weight))
    apply_delta(found, residual, solution, index)
    apply_delta(again, residual, solution, index)
    expected = apply_delta_ref(*in_float64((weight, residual, solution)), index)
    yardstick = apply_delta_ref(weight, residual, solution, index).to(dtype)
    assert_tolerance_bites(found, expected, yardstick, "apply_delta")
    assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("case", [*CASES[:-1], Case("tiles", 37, 193)], ids=str)
def test_the_history_takes_the_products_and_stays_symmetric(case, dtype):
    moment, _, keys, _, _ = Factory(case, dtype, DEVICE).gram()
    found = moment.clone()
    assert gram_update(found, keys) is found
    expected = gram_update_ref(*in_float64((moment, keys)))
    assert_close(found, expected, gram_update_ref(moment, keys), "gram_update")
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("case", [*CASES[:-1], Case("pieces", 4, 1, d_model=4100)], ids=str)
def test_the_adam_step_follows_the_definition(case, dtype):
    inputs = Factory(case, dtype, DEVICE).adam()
    delta, grad, moment1, moment2, decay, radius = copies(inputs)
    sparse_adam(delta, grad, moment1, moment2, 3, SETTINGS, decay, radius)
    expected = sparse_adam_ref(*in_float64(inputs[:4]), 3, SETTINGS, *in_float64(inputs[4:]))
    yardstick = sparse_adam_ref(*inputs[:4], 3, SETTINGS, *inputs[4:])
    for value, wanted, same_dtype in zip((delta, moment1, moment2), expected, yardstick, strict=True):
        assert_close(value, wanted, same_dtype, "sparse_adam")


def test_a_broken_row_stays_broken_and_alone():
    inputs = Factory(Case("broken", 3, 1, d_model=9), device=DEVICE).adam()
    inputs.delta[1, 4] = float("nan")
    sparse_adam(*inputs[:4], 3, SETTINGS, *inputs[4:])
    assert inputs.delta[1].isnan().all()
    assert inputs.delta[[0, 2]].isfinite().all()


def test_an_update_in_half_precision_is_refused_with_the_reason():
    weight, residual, solution, index = repeated_update(torch.float32)
    with pytest.raises(_dispatch.BackendUnavailable, match="residual is bfloat16, the kernel takes float32 or float64"):
        apply_delta(weight, residual.bfloat16(), solution, index)
