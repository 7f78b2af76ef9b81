"""capture_keys against the formula written out edit by edit, in every input dtype."""

import math

import pytest
import torch

from fastedit.ops.capture_keys import ACTIVATIONS, capture_keys, capture_keys_ref
from fastedit.testing import CASES, Case, Factory, assert_close, assert_tolerance_bites, in_float64

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = Case("small", 4, 10)
SCALAR = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
}


def formula(gate, up, weights, activation, active):
    """The docstring's two sums, in float64: one edit and one template at a time, the activation by `math`."""
    gate, up, weights = in_float64((gate, up, weights))
    keys = torch.zeros(gate.shape[0], gate.shape[2], dtype=torch.float64)
    for edit in range(gate.shape[0]):
        for template in range(gate.shape[1]):
            row = gate[edit, template].clone().apply_(SCALAR[activation])
            keys[edit] += weights[template] * (row if up is None else row * up[edit, template])
    mass = torch.zeros(gate.shape[2], dtype=torch.float64)
    for edit in range(gate.shape[0]):
        if active is None or active[edit]:
            mass += keys[edit].abs()
    return keys, mass


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_keys_and_mass_follow_the_formula(case, dtype, backend, device, nan_scratch):
    gate, up, weights, active = Factory(case, dtype, device).capture()
    found = capture_keys(gate, up, weights, "silu", active)
    torch_result = capture_keys_ref(gate, up, weights, "silu", active)
    for value, expected, same_dtype in zip(
        found, formula(gate, up, weights, "silu", active), torch_result, strict=True
    ):
        assert value.dtype == torch.float32
        assert_close(value, expected, same_dtype, "capture_keys")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_follows_its_formula_and_is_told_apart_from_the_others(activation, backend, device):
    gate, up, weights, active = Factory(SMALL, device=device).capture()
    found = capture_keys(gate, up, weights, activation, active).keys
    for other in ACTIVATIONS:
        expected = formula(gate, up, weights, other, active)[0]
        if other == activation:
            assert_tolerance_bites(found, expected, found, "capture_keys")
        else:
            with pytest.raises(AssertionError, match="error"):
                assert_close(found, expected, found, "capture_keys")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_hold_over_their_whole_range(activation, backend, device):
    gate = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 600.0, -600.0])])
    found = (
        capture_keys(gate.to(device)[None, None], None, torch.ones(1, device=device), activation).keys[0].double().cpu()
    )
    expected = gate.double().apply_(SCALAR[activation])
    assert float(((found - expected).abs() / (1 + expected.abs())).max()) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_hold_at_the_largest_numbers(activation, dtype, backend, device):
    """In whole vectors and in the last, partial one."""
    gate = torch.tensor([-3e38, 3e38, -1e30, 1e30, -1e20, -105.0, -1e3], dtype=dtype).repeat(7)
    found = capture_keys(gate.to(device)[None, None], None, torch.ones(1, device=device), activation).keys[0].cpu()
    expected = torch.where(gate > 0, gate.float(), 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-36)
    assert not found[gate < -1e10].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_infinite_gate_stays_one_or_is_not_a_number(activation, backend, device):
    gate = torch.full((1, 1, 21), float("inf"), device=device)
    assert not capture_keys(gate, None, torch.ones(1, device=device), activation).keys.isfinite().any()
    if activation != "relu":
        assert not capture_keys(-gate, None, torch.ones(1, device=device), activation).keys.isfinite().any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_reaches_its_own_neuron_only(activation, backend, device):
    gate = torch.ones(2, 3, 40, device=device)
    gate[1, 2, 7] = float("nan")
    keys, mass = capture_keys(gate, gate, torch.ones(3, device=device), activation)
    assert keys.isnan().nonzero().tolist() == [[1, 7]]
    assert mass.isnan().nonzero().tolist() == [[7]]


def test_the_reference_in_float64_is_the_formula():
    inputs = in_float64(Factory(SMALL).capture())
    gate, up, weights, active = inputs
    found = capture_keys_ref(gate, up, weights, "silu", active)
    for value, expected in zip(found, formula(gate, up, weights, "silu", active), strict=True):
        assert_tolerance_bites(value, expected, value, "capture_keys")


def test_an_edit_that_is_not_active_has_a_key_but_no_mass(backend, device):
    gate, up, weights, _ = Factory(SMALL, device=device).capture()
    active = torch.tensor([True, False, True, False], device=device)
    everyone, counted = capture_keys(gate, up, weights, "silu"), capture_keys(gate, up, weights, "silu", active)
    assert torch.equal(everyone.keys, counted.keys)
    assert torch.equal(counted.mass, counted.keys[[0, 2]].abs().sum(0))
    assert torch.equal(everyone.mass, everyone.keys.abs().sum(0))
    gate[1] = float("nan")
    assert torch.equal(capture_keys(gate, up, weights, "silu", active).mass, counted.mass)


def test_nothing_active_has_no_mass(backend, device):
    gate, up, weights, _ = Factory(SMALL, device=device).capture()
    assert not capture_keys(gate, up, weights, "silu", torch.zeros(4, dtype=torch.bool, device=device)).mass.any()


def test_the_inputs_are_left_alone(backend, device):
    inputs = Factory(SMALL, device=device).capture()
    before = [value.clone() for value in inputs]
    gate, up, weights, active = inputs
    capture_keys(gate, up, weights, "relu", active)
    assert all(torch.equal(value, copy) for value, copy in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "argument"),
    [
        pytest.param({"gate": torch.zeros(4, 10)}, ValueError, "gate", id="gate_2d"),
        pytest.param({"up": torch.zeros(4, 3, 9)}, ValueError, "up", id="up_narrow"),
        pytest.param({"up": torch.zeros(4, 3, 10).half()}, TypeError, "up", id="up_half"),
        pytest.param({"weights": torch.zeros(4)}, ValueError, "weights", id="weights_long"),
        pytest.param({"active": torch.ones(3, dtype=torch.bool)}, ValueError, "active", id="active_short"),
        pytest.param({"activation": "tanh"}, ValueError, "activation", id="activation_unknown"),
    ],
)
def test_wrong_arguments_are_named(changes, error, argument):
    arguments = {**Factory(SMALL).capture()._asdict(), "activation": "silu", **changes}
    with pytest.raises(error, match=f"capture_keys: {argument} must be"):
        capture_keys(**arguments)
