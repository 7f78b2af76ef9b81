"""The chain in one cooperative launch, emulated: every block on a thread of its own, barriers of the whole grid."""

import pytest
import torch

from fastedit.ops.capture_keys import capture_keys_ref
from fastedit.ops.cuda.system_chain import one_launch, three_launches
from fastedit.ops.masked_gram import masked_gram_ref
from fastedit.ops.select_neurons import select_neurons_ref
from fastedit.ops.system_chain import SystemChain
from fastedit.testing import Case, Factory, assert_close, assert_same_indices, in_float64

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("rule", [{"reaching": 0.7}, {"within": 0.4}, {"reaching": 1.0}], ids=str)
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float64), (torch.float16, torch.float32)],
    ids=str,
)
def test_one_launch_is_the_three_ops_in_a_row(order, rows, dtype, rule):
    case = Case("chain", 7, 200, n_templates=3)
    gate, up, weights, active = Factory(case, rows).capture()
    moment, weight, past, history, _ = Factory(case).gram()
    past = past[:4]
    share = (rule.get("reaching"), rule.get("within"))
    args = SystemChain(gate, up, weights, "silu", active, moment, weight, history, past, *share, dtype)
    found = one_launch(args)
    expected = capture_keys_ref(*in_float64((gate, up, weights)), "silu", active)
    yardstick = capture_keys_ref(gate, up, weights, "silu", active)
    assert_close(found.keys, expected.keys, yardstick.keys, "capture_keys")
    assert_close(found.mass, expected.mass, yardstick.mass, "capture_keys")
    size, broken, negative = found.status.tolist()
    assert (broken, negative) == (0, 0)
    index = found.neurons[:size]
    assert_same_indices(index, select_neurons_ref(found.mass, None, *share).tolist(), "select_neurons")
    matrix = found.system[: size * size].view(size, size)
    inputs = (moment, weight, torch.cat([past, found.keys[active]]), history, index)
    assert_close(matrix, masked_gram_ref(*in_float64(inputs)), masked_gram_ref(*inputs, dtype=dtype), "masked_gram")
    assert torch.equal(matrix, matrix.T)
    apart = three_launches(args).read()
    assert torch.equal(apart.neurons, index)
    assert torch.equal(apart.matrix, matrix)


def test_a_key_that_is_not_finite_leaves_no_neuron_and_a_flag():
    case = Case("broken", 3, 40)
    gate, up, weights, _ = Factory(case).capture()
    moment, weight, _, _, _ = Factory(case).gram()
    gate[1, 0, 7] = float("nan")
    args = SystemChain(gate, up, weights, "silu", None, moment, weight, reaching=0.5, dtype=torch.float32)
    found = one_launch(args)
    assert found.status.tolist() == [0, 1, 0]
    assert found.system.isnan().all()
