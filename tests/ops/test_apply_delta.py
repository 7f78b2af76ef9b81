"""apply_delta against W[:, s] += sum over edits of residual * solution, and what must keep its bits."""

import pytest
import torch

from fastedit.ops.apply_delta import apply_delta, apply_delta_ref
from fastedit.testing import CASES, Case, Factory, assert_close, assert_tolerance_bites, in_float64

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SMALL = Case("small", 4, 12, d_model=5, selected=6)
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.dtype])


def formula(weight, residual, solution, chosen):
    """The update in float64, neuron by neuron."""
    weight, residual, solution = in_float64((weight, residual, solution))
    columns = range(weight.shape[1]) if chosen is None else chosen.tolist()
    for row, column in enumerate(columns):
        weight[:, column] += (residual * solution[row][:, None]).sum(0)
    return weight


def updated(inputs):
    """The weight and the master after the update, beside torch's result in the dtype of each."""
    weight, residual, solution, chosen, master = inputs
    torch_result = apply_delta_ref(weight if master is None else master, residual, solution, chosen)
    apply_delta(weight, residual, solution, chosen, master)
    return weight, master, torch_result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_weight_and_its_master_follow_the_formula(case, dtype, backend, device, nan_scratch):
    inputs = Factory(case, dtype, device).delta()
    expected = formula(inputs.master if case.optional else inputs.weight, *inputs[1:4])
    weight, master, torch_result = updated(inputs)
    assert_close(weight, expected, torch_result.to(dtype), "apply_delta")
    if case.optional:
        assert_close(master, expected, torch_result, "apply_delta")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerance_bites(dtype, backend, device):
    inputs = Factory(SMALL, dtype, device).delta()
    expected = formula(inputs.master, *inputs[1:4])
    weight, _, torch_result = updated(inputs)
    assert_tolerance_bites(weight, expected, torch_result.to(dtype), "apply_delta")


@pytest.mark.parametrize("with_master", [True, False], ids=["master", "bare"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_that_are_not_selected_keep_their_bits(dtype, with_master, backend, device):
    weight, residual, solution, chosen, master = Factory(SMALL, dtype, device).delta()
    rest = torch.tensor(sorted(set(range(12)) - set(chosen.tolist())))
    for tensor in (weight, master):
        tensor[0, rest] = -0.0
        tensor[1, rest] = float("nan")
        tensor[2, rest] = -float("inf")
    # A quiet NaN with a payload, and a weight that is not its rounded master.
    bits(weight)[1, rest[0]] += 5
    weight[3, rest] += 1.0
    old = [bits(tensor).clone() for tensor in (weight, master)]
    apply_delta(weight, residual, solution, chosen, master if with_master else None)
    for tensor, before in zip((weight, master), old, strict=True):
        assert torch.equal(bits(tensor)[:, rest], before[:, rest])
    assert not torch.equal(bits(weight)[:, chosen], old[0][:, chosen])
    assert torch.equal(bits(master)[:, chosen], old[1][:, chosen]) is not with_master


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_edits_and_no_neurons_change_nothing(dtype, backend, device):
    for n_edits, selected in ((0, 6), (4, 0), (0, None)):
        weight, residual, solution, chosen, _ = Factory(Case("", n_edits, 12, selected=selected), dtype, device).delta()
        before = weight.clone()
        apply_delta(weight, residual, solution, chosen)
        assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_indices_add_up(dtype, backend, device):
    weight, residual, solution, _, _ = Factory(SMALL, dtype, device).delta()
    chosen = torch.tensor([7, 2, 7, 7, 0, 2], device=device)
    inputs = (weight, residual, solution, chosen, None)
    expected = formula(*inputs[:4])
    found, _, torch_result = updated(inputs)
    assert_close(found, expected, torch_result.to(dtype), "apply_delta")


def test_repeated_indices_of_a_float64_weight_add_up_in_float64(backend, device):
    """In float32 the small parts of the column would vanish beside the large one."""
    weight, chosen = torch.zeros(1, 2, dtype=torch.float64, device=device), torch.tensor([1, 1, 1], device=device)
    solution = torch.tensor([[1.0], [2.0**-30], [2.0**-40]], device=device)
    apply_delta(weight, torch.ones(1, 1, device=device), solution, chosen)
    assert weight.tolist() == [[0.0, 1 + 2.0**-30 + 2.0**-40]]


@pytest.mark.parametrize("chosen", [None, [1, 4, 11], [7, 2, 7, 7, 0, 2], []], ids=["all", "some", "repeated", "none"])
@pytest.mark.parametrize("with_master", [True, False], ids=["master", "bare"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transposed_weight_takes_the_same_update(dtype, with_master, chosen, backend, device):
    """GPT-2 stores the down-projection transposed."""
    case = Case("", 4, 12, d_model=5, selected=None if chosen is None else len(chosen))
    weight, residual, solution, _, master = Factory(case, dtype, device).delta()
    index = None if chosen is None else torch.tensor(chosen, dtype=torch.int64, device=device)
    master = master if with_master else None
    expected = formula(weight if master is None else master, residual, solution, index)
    yardstick = apply_delta_ref(weight if master is None else master, residual, solution, index)
    transposed = [None if tensor is None else tensor.T.contiguous().T for tensor in (weight, master)]

    apply_delta(transposed[0], residual, solution, index, transposed[1])

    columns = slice(None) if index is None else index
    assert_close(transposed[0][:, columns], expected[:, columns], yardstick[:, columns].to(dtype), "apply_delta")
    if master is not None:
        assert_close(transposed[1], expected, yardstick, "apply_delta")


@pytest.mark.parametrize("index", [[0, 12], [-1, 3]])
def test_an_index_out_of_range_is_an_error_and_changes_nothing(index, backend):
    weight, residual, solution, _, _ = Factory(Case("", 4, 12, d_model=5, selected=2)).delta()
    before = weight.clone()
    with pytest.raises((IndexError, RuntimeError)):
        apply_delta(weight, residual, solution, torch.tensor(index))
    assert torch.equal(weight, before)


def test_an_index_in_any_order_puts_each_row_into_its_column(backend):
    weight, solution = torch.zeros(1, 4), torch.tensor([[1.0], [2.0], [3.0]])
    apply_delta(weight, torch.ones(1, 1), solution, torch.tensor([3, 0, 2]))
    assert weight.tolist() == [[2.0, 0.0, 3.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_weights_are_rounded_once(dtype, backend, device):
    if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter cuts float32 down to bfloat16; a GPU rounds")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 40, generator=generator).to(device, dtype)
    # Multiples of 2^-6 below 1: products and sums are exact in float32, so one rounding gives one answer.
    sizes = ((3, 64), (40, 3))
    residual, solution = (torch.randint(-63, 64, size, generator=generator).to(device) / 64 for size in sizes)
    expected = formula(weight, residual, solution, None).float().to(dtype)
    twice = weight + (solution @ residual).T.to(dtype)
    apply_delta(weight, residual, solution)
    assert torch.equal(weight, expected)
    assert not torch.equal(weight, twice)


def test_a_master_keeps_a_thousand_updates_below_half_an_ulp(backend):
    kept, lost = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16)
    master = kept.float()
    residual, solution, chosen = torch.ones(1, 2), torch.full((1, 1), 2.0**-10), torch.tensor([1])
    for _ in range(1000):
        apply_delta(kept, residual, solution, chosen, master)
        apply_delta(lost, residual, solution, chosen)
    grown = 1 + 1000 * 2.0**-10
    assert master.tolist() == [[1.0, grown, 1.0]] * 2
    assert kept.tolist() == [[1.0, grown, 1.0]] * 2
    assert lost.tolist() == [[1.0, 1.0, 1.0]] * 2


def test_the_update_itself_is_left_alone(backend, device):
    inputs = Factory(SMALL, device=device).delta()
    before = [value.clone() for value in inputs[1:4]]
    apply_delta(*inputs)
    assert all(torch.equal(value, copy) for value, copy in zip(inputs[1:4], before, strict=True))


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        pytest.param({"weight": torch.zeros(12)}, "weight", id="weight_1d"),
        pytest.param({"weight": torch.zeros(12, 5)}, "weight", id="weight_transposed"),
        pytest.param({"solution": torch.zeros(12, 4)}, "solution", id="solution_of_every_neuron"),
        pytest.param({"solution": torch.zeros(4, 6)}, "solution", id="solution_transposed"),
        pytest.param({"index": torch.arange(5)}, "solution", id="index_short"),
        pytest.param({"index": None}, "solution", id="index_left_out"),
        pytest.param({"master": torch.zeros(5, 11)}, "master", id="master_narrow"),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(changes, argument):
    weight, residual, solution, chosen, master = Factory(SMALL).delta()
    arguments = {"weight": weight, "residual": residual, "solution": solution, "index": chosen, "master": master}
    arguments |= changes
    before = arguments["weight"].clone()
    with pytest.raises(ValueError, match=f"apply_delta: {argument} must be"):
        apply_delta(**arguments)
    assert torch.equal(arguments["weight"], before)
