"""The Triton kernels through the public ops, under Triton's interpreter (or on the device, where there is one)."""

import itertools

import pytest
import torch

from fastedit.ops import _dispatch
from fastedit.ops.capture_keys import ACTIVATIONS, capture_keys, capture_keys_ref
from fastedit.ops.masked_gram import masked_gram, masked_gram_ref
from fastedit.ops.select_neurons import SelectNeurons, select_neurons, select_neurons_ref
from fastedit.testing import CASES, Case, Factory, assert_close, assert_same_indices, assert_tolerance_bites, in_float64

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINGLE = (torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)
RULES = ({"top_k": 1}, {"top_k": 0.3}, {"reaching": 0.65}, {"within": 0.65}, {"reaching": 1.0}, {"within": 1e-6})


@pytest.fixture(autouse=True)
def on_triton():
    with _dispatch.backend("triton"):
        yield


def reversed_index(index):
    """The index against the direction in which the kernels like it."""
    return None if index is None else index.flip(0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", SINGLE, ids=str)
@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_keys_and_mass_are_those_of_the_definition(case, dtype, activation):
    inputs = Factory(case, dtype, DEVICE).capture()
    rows, active = inputs[:3], inputs.active
    found = capture_keys(*rows, activation, active)
    expected = capture_keys_ref(*in_float64(rows), activation, active)
    torch_result = capture_keys_ref(*rows, activation, active)
    for value, wanted, yardstick in zip(found, expected, torch_result, strict=True):
        assert_close(value, wanted, yardstick, "capture_keys")


@pytest.mark.parametrize("n_templates", [0, 8, 9, 21])
def test_any_number_of_templates_is_summed(n_templates):
    inputs = Factory(Case("templates", 3, 70, n_templates=n_templates), device=DEVICE).capture()
    found = capture_keys(*inputs[:3], "silu", inputs.active)
    expected = capture_keys_ref(*in_float64(inputs[:3]), "silu", inputs.active)
    assert_close(found.keys, expected.keys, capture_keys_ref(*inputs[:3], "silu").keys, "capture_keys")


def test_the_mass_of_many_edits_is_summed_over_programs_and_leaves_out_what_is_not_active():
    gate, up, weights, _ = Factory(Case("many", 40, 1537, n_templates=1), device=DEVICE).capture()
    active = torch.arange(40, device=DEVICE) % 2 == 0
    gate[1] = float("nan")
    found = capture_keys(gate, up, weights, "silu", active)
    expected = capture_keys_ref(*in_float64((gate, up, weights)), "silu", active)
    yardstick = capture_keys_ref(gate, up, weights, "silu", active)
    assert_tolerance_bites(found.mass, expected.mass, yardstick.mass, "capture_keys")
    assert found.keys[1].isnan().all()
    assert torch.equal(capture_keys(gate, up, weights, "silu", active).mass, found.mass)


def test_a_nan_comes_through_every_activation():
    gate = torch.full((1, 1, 3), float("nan"), device=DEVICE)
    for activation in ACTIVATIONS:
        assert capture_keys(gate, None, torch.ones(1, device=DEVICE), activation).keys.isnan().all()


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_selection_is_exact(case, rule, ties):
    ((name, value),) = rule.items()
    value = max(1, int(value * case.d_ff)) if name == "top_k" else value
    for dtype in SINGLE:
        score = Factory(case, dtype, DEVICE).score(ties)
        found = select_neurons(score, **{name: value})
        assert_same_indices(found, select_neurons_ref(score, **{name: value}).tolist(), "select_neurons")


@pytest.mark.parametrize(
    ("scores", "rule", "expected"),
    [
        pytest.param([-1.0, -3.0, -1.0, -2.0], {"top_k": 3}, [0, 2, 3], id="negative"),
        pytest.param([0.0, -0.0, 0.0], {"top_k": 2}, [0, 1], id="both_zeros_are_equal"),
        pytest.param([-0.0, 1e-45, -0.0], {"top_k": 1}, [1], id="denormal"),
        pytest.param([0.0, 0.0], {"reaching": 0.5}, [0], id="no_mass_to_reach"),
        pytest.param([0.0, 0.0], {"within": 0.5}, [0, 1], id="no_mass_to_stay_within"),
        pytest.param([1, 2, 9, 1], {"within": 0.1}, [2], id="within_takes_one_at_least"),
        pytest.param([3.4e38] * 4, {"reaching": 0.5}, [0, 1], id="sums_past_float32"),
        pytest.param([2**26] + [1] * 8, {"reaching": (2**26 + 4) / (2**26 + 8)}, [0, 1, 2, 3, 4], id="float64_sums"),
        pytest.param([2**26] + [1] * 8, {"within": (2**26 + 4.5) / (2**26 + 8)}, [0, 1, 2, 3, 4], id="float64_within"),
    ],
)
def test_selections_worked_by_hand(scores, rule, expected):
    score = torch.tensor(scores, dtype=torch.float32, device=DEVICE)
    assert_same_indices(select_neurons(score, **rule), expected, "select_neurons")


def test_selections_of_every_prefix_are_those_of_the_sort():
    generator = torch.Generator().manual_seed(3)
    score = torch.randint(0, 6, (37,), generator=generator).float().to(DEVICE)
    for k in range(1, 38):
        assert_same_indices(select_neurons(score, top_k=k), select_neurons_ref(score, k).tolist(), "select_neurons")
    for step, name in itertools.product(range(1, 40), ("reaching", "within")):
        rule = {name: step / 40}
        assert_same_indices(select_neurons(score, **rule), select_neurons_ref(score, **rule).tolist(), "select_neurons")


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("order", [None, reversed_index], ids=["ascending", "descending"])
@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_the_system_matrix_is_that_of_the_definition(case, order, dtype):
    moment, weight, keys, history, index = Factory(case, device=DEVICE).gram()
    index = index if order is None else order(index)
    inputs = (moment, weight, keys, history, index)
    found = masked_gram(*inputs, dtype=dtype)
    assert torch.equal(found, found.T)
    assert_close(found, masked_gram_ref(*in_float64(inputs)), masked_gram_ref(*inputs, dtype=dtype), "masked_gram")


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_tiles_meet_without_gap_or_overlap(dtype):
    inputs = Factory(Case("tiles", 37, 333, selected=193), device=DEVICE).gram()
    inputs = inputs._replace(weight=0.1)
    found = masked_gram(*inputs, dtype=dtype)
    yardstick = masked_gram_ref(*inputs, dtype=dtype)
    assert_tolerance_bites(found, masked_gram_ref(*in_float64(inputs)), yardstick, "masked_gram")
    assert torch.equal(found, found.T)


def test_what_the_kernels_do_not_take_is_refused_with_the_reason():
    gate = torch.zeros(1, 1, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(_dispatch.BackendUnavailable, match="gate is float64, the kernel takes float32 or bfloat16 or"):
        capture_keys(gate, None, torch.ones(1, device=DEVICE), "relu")
    with pytest.raises(_dispatch.BackendUnavailable, match="score is float64"):
        select_neurons(gate.view(-1), top_k=1)
    with pytest.raises(_dispatch.BackendUnavailable, match="65537 scores do not fit one program"):
        select_neurons(torch.zeros(65537, device=DEVICE), top_k=1)


def test_select_neurons_counts_a_nan_of_any_payload_on_the_device():
    from fastedit.kernels.select_neurons import select_on_device

    bits = torch.tensor([0x7FC00000, 0x7FC00001, -0x3FFFFF, 0x7F800000, 0x3F800000], dtype=torch.int32)
    status = select_on_device(SelectNeurons(bits.view(torch.float32).to(DEVICE), 1))[1]
    assert status[1] == 4
