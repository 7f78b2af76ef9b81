"""The code of the CUDA kernels, run on the CPU: indices, ties, tiles, barriers, and what the launchers pass.

Speed, memory ordering between blocks, and the rounding of the device's own functions need a GPU (tests/ops, `gpu`).
"""

import ctypes

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastedit.ops.apply_delta import ApplyDelta, apply_delta_ref
from fastedit.ops.capture_keys import ACTIVATIONS, CaptureKeys, capture_keys_ref
from fastedit.ops.cuda.apply_delta import apply_delta
from fastedit.ops.cuda.capture_keys import capture_keys
from fastedit.ops.cuda.gram_update import gram_update
from fastedit.ops.cuda.masked_gram import masked_gram, masked_gram_on_device
from fastedit.ops.cuda.select_neurons import select_neurons, select_on_device
from fastedit.ops.cuda.sparse_adam import sparse_adam
from fastedit.ops.gram_update import GramUpdate, gram_update_ref
from fastedit.ops.masked_gram import MaskedGram, masked_gram_ref
from fastedit.ops.select_neurons import SelectNeurons, select_neurons_ref
from fastedit.ops.sparse_adam import AdamSettings, SparseAdam, sparse_adam_ref
from fastedit.testing import CASES, Case, Factory, assert_close, assert_same_indices, in_float64, relative_error

pytestmark = pytest.mark.usefixtures("emulated")

EMPTY = Case("empty", 4, 20, d_model=5, n_templates=2, selected=6)
SYSTEM_DTYPES = (torch.float32, torch.float64)
# Three rows of tiles, the last of them partial; several steps of the product, the last of them partial.
TILES = Case("tiles", 21, 400, selected=300)
RULES = ({"top_k": 0.3}, {"reaching": 0.65}, {"within": 0.65}, {"reaching": 1.0}, {"within": 1e-6})
# Values with few bits add up exactly in any order, so the loop over the sorted scores is the exact answer.
SCORES = st.lists(st.sampled_from([0.0, 0.25, 1.0, 1.5, 3.0, 1024.0]), min_size=1, max_size=70)


def assert_close_to_the_definition(found, inputs, dtype):
    expected = masked_gram_ref(*in_float64(inputs))
    assert_close(found, expected, masked_gram_ref(*inputs, dtype=dtype), "masked_gram")
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("dtype", SYSTEM_DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES[:-1], TILES], ids=str)
def test_the_tiles_make_up_the_system_matrix(case, dtype):
    inputs = Factory(case).gram()
    assert_close_to_the_definition(masked_gram(MaskedGram(*inputs, dtype)), inputs, dtype)


@pytest.mark.parametrize("dtype", SYSTEM_DTYPES, ids=str)
def test_float64_inputs_are_rounded_to_the_dtype_of_the_result(dtype):
    inputs = Factory(Case("wide", 11, 150, selected=140), torch.float64).gram()
    assert_close_to_the_definition(masked_gram(MaskedGram(*inputs, dtype)), inputs, dtype)


@pytest.mark.parametrize("dtype", SYSTEM_DTYPES, ids=str)
def test_no_barrier_is_missing_in_the_tiles(order, dtype):
    inputs = Factory(Case("order", 19, 200, selected=170)).gram()
    assert_close_to_the_definition(masked_gram(MaskedGram(*inputs, dtype)), inputs, dtype)


@pytest.mark.parametrize("size", [0, 1, 128, 129, 200])
def test_the_size_is_read_in_device_memory_and_the_result_is_packed(size):
    case = Case("counted", 6, 260, selected=200)
    moment, weight, keys, history, index = Factory(case).gram()
    past = Factory(Case("past", 5, 260), seed=1).gram().keys
    active = torch.arange(6) % 3 != 2
    count = torch.tensor([size, 0, 0])
    args = MaskedGram(moment, weight, keys, history, index, torch.float64)
    flat = masked_gram_on_device(args, count, past, active)
    assert torch.isnan(flat[size * size :]).all()
    rows = torch.cat([past, keys[active]])
    assert_close_to_the_definition(
        flat[: size * size].view(size, size), (moment, weight, rows, history, index[:size]), torch.float64
    )


@pytest.mark.parametrize("dtype", SYSTEM_DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[2], Case("tiles", 9, 300)], ids=str)
def test_the_history_takes_the_products_in_place(case, dtype):
    _, _, keys, history, _ = Factory(case, dtype).gram()
    expected, yardstick = gram_update_ref(*in_float64((history, keys))), gram_update_ref(history, keys)
    gram_update(GramUpdate(history, keys))
    assert_close(history, expected, yardstick, "gram_update")
    assert torch.equal(history, history.T)


def test_every_tile_of_a_large_triangle_has_its_row(emulated_file):
    row_of = ctypes.CDLL(str(emulated_file)).triangle_row
    row_of.argtypes, row_of.restype = [ctypes.c_int64], ctypes.c_int64
    for row in (0, 1, 2, 3, 112, 511, 8191, 2**20, 2**31 - 1):
        first = row * (row + 1) // 2
        assert row_of(first) == row
        assert row_of(first + row) == row
        assert row == 0 or row_of(first - 1) == row - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, Case("long", 70, 40, n_templates=2)], ids=str)
def test_the_strips_make_up_keys_and_mass(case, dtype):
    gate, up, weights, active = Factory(case, dtype).capture()
    found = capture_keys(CaptureKeys(gate, up, weights, "silu", active))
    same_dtype = capture_keys_ref(gate, up, weights, "silu", active)
    expected = capture_keys_ref(*in_float64((gate, up, weights)), "silu", active)
    for part in range(2):
        assert_close(found[part], expected[part], same_dtype[part], "capture_keys")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_is_its_own(activation):
    gate, up, weights, active = Factory(Case("odd", 7, 61)).capture()
    found = capture_keys(CaptureKeys(gate, up, weights, activation, active))
    expected = capture_keys_ref(*in_float64((gate, up, weights)), activation, active)
    assert_close(
        found.keys, expected.keys, capture_keys_ref(gate, up, weights, activation, active).keys, "capture_keys"
    )


def test_rows_that_cannot_be_read_16_bytes_at_a_time_give_the_same_bits(order):
    gate, up, weights, active = Factory(Case("shifted", 5, 72), torch.bfloat16).capture()
    shifted = torch.zeros(5, 3, 80, dtype=torch.bfloat16)[..., 1:73].copy_(gate)
    narrow = torch.zeros(5, 3, 80, dtype=torch.bfloat16)[..., :70].copy_(gate[..., :70])
    wide = capture_keys(CaptureKeys(gate, up, weights, "gelu", active))
    for found in (
        capture_keys(CaptureKeys(shifted, up, weights, "gelu", active)),
        capture_keys(CaptureKeys(gate, up, weights, "gelu", active)),
    ):
        assert torch.equal(found.keys, wide.keys)
    partial = capture_keys(CaptureKeys(narrow, up[..., :70], weights, "gelu", active))
    assert torch.equal(partial.keys, wide.keys[:, :70])
    assert torch.equal(partial.mass, wide.mass[:70])


def test_not_a_number_stays_one():
    gate = torch.full((1, 1, 9), float("nan"))
    for activation in ACTIVATIONS:
        assert capture_keys(CaptureKeys(gate, None, torch.ones(1), activation, None)).keys.isnan().all()


def rule_of(rule, size):
    top_k = rule.get("top_k")
    return None if top_k is None else max(1, int(top_k * size)), rule.get("reaching"), rule.get("within")


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("case", [*CASES[:-1], Case("wide", 1, 1100)], ids=str)
def test_the_bits_select_what_the_sort_selects(case, rule, ties):
    score = Factory(case).score(ties)
    wanted = rule_of(rule, case.d_ff)
    assert_same_indices(
        select_neurons(SelectNeurons(score, *wanted)), select_neurons_ref(score, *wanted).tolist(), "select_neurons"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scores_of_other_dtypes_are_compared_as_they_are(rule, dtype):
    score = Factory(Case("odd", 1, 161), dtype).score()
    wanted = rule_of(rule, 161)
    assert_same_indices(
        select_neurons(SelectNeurons(score, *wanted)), select_neurons_ref(score, *wanted).tolist(), "select_neurons"
    )


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scores=SCORES, share=st.sampled_from([0.01, 0.125, 0.25, 0.5, 0.75, 0.99]), sign=st.sampled_from([1.0, -1.0]))
def test_ties_and_bounds_fall_as_in_the_sort(scores, share, sign):
    score = torch.tensor(scores)
    for reaching, within in ((share, None), (None, share)):
        expected = select_neurons_ref(score, None, reaching, within).tolist()
        assert_same_indices(select_neurons(SelectNeurons(score, None, reaching, within)), expected, "select_neurons")
    top_k = max(1, round(share * len(scores)))
    expected = select_neurons_ref(sign * score, top_k).tolist()
    assert_same_indices(select_neurons(SelectNeurons(sign * score, top_k, None, None)), expected, "select_neurons")


def test_no_barrier_is_missing_in_the_selection(order):
    score = Factory(Case("wide", 1, 1200)).score(ties=True)
    found = select_neurons(SelectNeurons(score, None, 0.4, None))
    assert_same_indices(found, select_neurons_ref(score, None, 0.4).tolist(), "select_neurons")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_warp_overtakes_another_in_the_selection(order, rule):
    """Every round sums over the block: a warp that is a round ahead must not change what another still reads."""
    score = Factory(Case("wide", 1, 700)).score()
    wanted = rule_of(rule, 700)
    found = select_neurons(SelectNeurons(score, *wanted))
    assert_same_indices(found, select_neurons_ref(score, *wanted).tolist(), "select_neurons")


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_raise_a_flag_on_the_device(bad):
    score = torch.tensor([1.0, bad, -2.0, bad])
    _, status = select_on_device(SelectNeurons(score, 1, None, None))
    assert status[:2].tolist() == [0, 2]
    with pytest.raises(ValueError, match="scores must be finite, got 2 NaN or Inf of 4"):
        select_neurons(SelectNeurons(score, None, 0.5, None))


def test_negative_scores_raise_a_flag_for_a_share_only():
    score = torch.tensor([3.0, -1.0, 2.0])
    assert select_on_device(SelectNeurons(score, None, 0.5, None))[1].tolist() == [0, 0, 1]
    assert select_on_device(SelectNeurons(score, 2, None, None))[1].tolist() == [2, 0, 1]


def updated(weight, residual, solution, index, master):
    """The weight by the definition: in float64, and as torch rounds it in the weight's dtype."""
    start = weight if master is None else master
    wide = apply_delta_ref(*in_float64((start, residual, solution)), index)
    return wide, apply_delta_ref(start, residual, solution, index).to(weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES[:-1], Case("tiles", 19, 300, d_model=150, selected=200)], ids=str)
def test_the_tiles_update_the_selected_columns(case, dtype):
    weight, residual, solution, index, master = Factory(case, dtype).delta()
    before, columns = weight.clone(), torch.arange(case.d_ff) if index is None else index
    wide, same_dtype = updated(weight, residual, solution, index, master)
    apply_delta(ApplyDelta(weight, residual, solution, index, master))
    untouched = torch.ones(case.d_ff, dtype=torch.bool).index_fill_(0, columns, False)
    assert torch.equal(weight[:, untouched], before[:, untouched])
    assert_close(weight[:, columns], wide[:, columns], same_dtype[:, columns], "apply_delta")
    if master is not None:
        assert torch.equal(weight[:, columns], master[:, columns].to(dtype))


def test_no_barrier_is_missing_in_the_update(order):
    weight, residual, solution, index, _ = Factory(Case("order", 19, 200, d_model=140, selected=150)).delta()
    wide, same_dtype = updated(weight, residual, solution, index, None)
    apply_delta(ApplyDelta(weight, residual, solution, index, None))
    assert_close(weight, wide, same_dtype, "apply_delta")


def test_a_solution_in_either_layout_gives_the_same_bits():
    weight, residual, solution, index, _ = Factory(Case("layout", 13, 90, d_model=20, selected=70)).delta()
    other = weight.clone()
    apply_delta(ApplyDelta(weight, residual, solution, index, None))
    apply_delta(ApplyDelta(other, residual, solution.T.contiguous().T, index, None))
    assert torch.equal(weight, other)


@pytest.mark.parametrize("names", [[5, 2, 9], [3, 3, 3], [7, 1, 7, 2, 1, 7], [4] * 130 + [2, 4]], ids=str)
def test_repeated_neurons_add_up_and_are_rounded_once(names):
    index = torch.tensor(names)
    case = Case("repeated", 5, 12, d_model=9)
    weight, residual, _, _, _ = Factory(case, torch.bfloat16).delta()
    solution = Factory(Case("x", 5, len(names))).delta().solution
    wide, same_dtype = updated(weight, residual, solution, index, None)
    apply_delta(ApplyDelta(weight, residual, solution, index, None))
    assert_close(weight, wide, same_dtype, "apply_delta")


@pytest.mark.parametrize("dtype", SYSTEM_DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES[:-1], Case("several", 5, 9, d_model=300)], ids=str)
def test_a_block_steps_its_row(case, dtype, order):
    state = Factory(case, dtype).adam()
    optimiser = AdamSettings(lr=0.3)
    tensors, (decay, radius) = state[:4], state[4:]
    expected = sparse_adam_ref(*in_float64(tensors), 3, optimiser, *in_float64((decay, radius)))
    yardstick = sparse_adam_ref(*tensors, 3, optimiser, decay, radius)
    sparse_adam(SparseAdam(*tensors, 3, optimiser, decay, radius))
    delta, _, moment1, moment2 = tensors
    for found, wanted, same_dtype in zip((delta, moment1, moment2), expected, yardstick, strict=True):
        assert_close(found, wanted, same_dtype, "sparse_adam")


@pytest.mark.parametrize("grad_size", [1e-39, 1e20])
@pytest.mark.parametrize("size", [1e-39, 1e20])
def test_tiny_and_huge_rows_step_as_in_float64(size, grad_size):
    generator = torch.Generator().manual_seed(0)
    delta, grad = (torch.randn(3, 40, generator=generator) * scale for scale in (size, grad_size / 10))
    state = [delta, grad, torch.zeros(3, 40), torch.zeros(3, 40)]
    decay, radius = torch.full((3,), 0.5), torch.full((3,), size)
    optimiser = AdamSettings(lr=0.1)
    expected = sparse_adam_ref(*in_float64(state), 1, optimiser, *in_float64((decay, radius)))
    sparse_adam(SparseAdam(*state, 1, optimiser, decay, radius))
    assert relative_error(state[0], expected[0]) <= (1e-5 if min(size, grad_size) > 1e-38 else 2e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_hold_at_the_largest_numbers(activation):
    gate = torch.tensor([-3e38, -1e30, 1e30, -1e20, -105.0]).repeat(7)
    found = capture_keys(CaptureKeys(gate[None, None], None, torch.ones(1), activation, None)).keys[0]
    torch.testing.assert_close(found, gate.clamp_min(0.0), rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("size", ["n_edits", "n_templates", "d_ff", "d_model", "selected"])
def test_every_dimension_may_be_zero(size):
    sizes = {**EMPTY.__dict__, size: 0}
    factory = Factory(Case(**{**sizes, "selected": 0} if size == "d_ff" else sizes))
    gate, up, weights, active = factory.capture()
    keys, mass = capture_keys(CaptureKeys(gate, up, weights, "silu", active))
    torch.testing.assert_close(keys, capture_keys_ref(gate, up, weights, "silu", active).keys, rtol=1e-5, atol=1e-6)
    assert mass.shape == gate.shape[2:]

    score = factory.score()
    assert_same_indices(
        select_neurons(SelectNeurons(score, None, 0.5, None)), select_neurons_ref(score, None, 0.5).tolist(), "select"
    )
    inputs = factory.gram()
    assert_close_to_the_definition(masked_gram(MaskedGram(*inputs, torch.float64)), inputs, torch.float64)
    gram_update(GramUpdate(inputs.history, inputs.keys))

    delta = factory.delta()
    expected = apply_delta_ref(delta.master, *delta[1:4])
    apply_delta(ApplyDelta(*delta))
    torch.testing.assert_close(delta.master, expected, rtol=1e-5, atol=1e-6)
    sparse_adam(SparseAdam(*factory.adam()[:4], 1, AdamSettings(0.1), *factory.adam()[4:]))
