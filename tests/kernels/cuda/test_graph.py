"""The chain on a GPU, captured in a CUDA graph: a capture refuses every wait for the device and every hidden copy."""

import pytest
import torch

from fastedit.ops.cuda import missing
from fastedit.ops.cuda.system_chain import one_launch, three_launches
from fastedit.ops.system_chain import SystemChain
from fastedit.testing import Case, Factory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

CASE = Case("graph", 24, 1536, n_templates=6)


def inputs():
    factory = Factory(CASE, torch.bfloat16, "cuda")
    gate, up, weights, active = factory.capture()
    moment, weight, _, history, _ = Factory(CASE, torch.float32, "cuda").gram()
    return SystemChain(gate, up, weights, "silu", active, moment, weight, history, reaching=0.6)


def parts(found):
    """Keys, mass, indices and matrix, cut to the number of neurons."""
    keys, mass, index, status, system = found
    size, broken, negative = status.tolist()
    assert (broken, negative) == (0, 0)
    assert 0 < size < CASE.d_ff
    return [part.clone() for part in (keys, mass, index[:size], system[: size * size])]


@pytest.mark.parametrize("chain", [three_launches, one_launch], ids=lambda chain: chain.__name__)
def test_the_chain_is_captured_and_replayed_without_the_host(chain):
    given = inputs()
    expected = parts(chain(given))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(given)
    for part in found:
        part.zero_()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(parts(found), expected, strict=True))
    given.gate.mul_(-0.5)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(parts(found), parts(chain(given)), strict=True))


def test_the_chain_runs_where_every_wait_is_an_error():
    given = inputs()
    expected = parts(three_launches(given))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = three_launches(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(parts(found), expected, strict=True))


def test_one_launch_takes_the_same_neurons_as_three():
    given = inputs()
    for one, other in zip(parts(one_launch(given)), parts(three_launches(given)), strict=True):
        assert torch.equal(one, other)


def test_equal_inputs_give_equal_bits():
    given = inputs()
    first = parts(three_launches(given))
    for _ in range(20):
        assert all(torch.equal(one, other) for one, other in zip(parts(three_launches(given)), first, strict=True))


def test_a_side_stream_is_waited_for_by_nobody_else():
    given = inputs()
    expected = parts(three_launches(given))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = three_launches(given)
    stream.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(parts(found), expected, strict=True))
