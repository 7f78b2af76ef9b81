"""The chain against its three ops in a row, on every backend, with and without a form of its own."""

import pytest
import torch

from fastedit.ops import _dispatch
from fastedit.ops.capture_keys import capture_keys_ref
from fastedit.ops.masked_gram import masked_gram_ref
from fastedit.ops.select_neurons import SelectNeurons, select_neurons_ref
from fastedit.ops.system_chain import system_chain, system_chain_ref
from fastedit.testing import Case, Factory, assert_close, assert_same_indices, in_float64

CASE = Case("chain", 7, 150, n_templates=3)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = ({"reaching": 0.6}, {"within": 0.6}, {"reaching": 1.0}, {"within": 1e-6})


def able(name):
    """Whether a backend can run the parts of the chain here."""
    args = SelectNeurons(torch.ones(2, device=DEVICE), 1)
    return _dispatch.unsupported("select_neurons", name, args) is None


@pytest.fixture(params=_dispatch.BACKENDS)
def chosen(request):
    if not able(request.param):
        pytest.skip(f"{request.param} cannot run here")
    with _dispatch.backend(request.param):
        yield request.param


def arguments(optional=True):
    """Rows, second moment, lambda, history and past keys of one layer."""
    factory = Factory(CASE, device=DEVICE)
    gate, up, weights, active = factory.capture()
    moment, weight, past, history, _ = factory.gram()
    if not optional:
        return (gate, None, weights, "silu", None, moment, weight, None, None)
    return (gate, up, weights, "silu", active, moment, weight, history, past[:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("optional", [True, False], ids=["all", "bare"])
def test_the_chain_is_its_three_ops_in_a_row(chosen, optional, rule, dtype):
    gate, up, weights, activation, active, moment, weight, history, past = given = arguments(optional)
    chain = system_chain(*given, **rule, dtype=dtype)
    index, matrix = chain.read()

    wide = in_float64((gate, up, weights))
    keys, mass = capture_keys_ref(*wide, activation, active)
    yardstick = capture_keys_ref(gate, up, weights, activation, active)
    assert_close(chain.keys, keys, yardstick.keys, "capture_keys")
    assert_close(chain.mass, mass, yardstick.mass, "capture_keys")
    # The selection is exact for the mass it was given.
    assert_same_indices(index, select_neurons_ref(chain.mass, **rule).tolist(), "select_neurons")
    rows = chain.keys if active is None else chain.keys[active]
    rows = rows if past is None else torch.cat([past, rows])
    inputs = (moment, weight, rows, history, index)
    assert_close(matrix, masked_gram_ref(*in_float64(inputs)), masked_gram_ref(*inputs, dtype=dtype), "masked_gram")
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_without_a_form_of_its_own_the_chain_is_its_parts_bit_for_bit(rule):
    given = arguments()
    with _dispatch.backend("torch"):
        found = system_chain(*given, **rule)
    for part, expected in zip(found, system_chain_ref(*given, **rule), strict=True):
        assert torch.equal(part, expected)


def test_a_backend_that_cannot_run_a_part_is_refused_by_that_part():
    given = arguments()
    name = "cuda" if DEVICE == "cpu" else "cpp"
    with _dispatch.backend(name), pytest.raises(_dispatch.BackendUnavailable, match="capture_keys: backend"):
        system_chain(*given, reaching=0.5)


@pytest.mark.parametrize("name", _dispatch.kinds("system_chain"))
def test_a_backend_of_its_own_runs_the_chain_whole(chosen, name, monkeypatch):
    """No part is dispatched by itself, and nothing is read before the end."""
    if chosen != name:
        pytest.skip("another backend")
    ran = []
    original = _dispatch._function
    monkeypatch.setattr(_dispatch, "_function", lambda *names: ran.append(names) or original(*names))
    system_chain(*arguments(), reaching=0.5)
    assert ran == [("system_chain", name, "system_chain")]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_mass_that_is_not_finite_is_an_error_when_the_chain_is_read(chosen, bad):
    gate, *others = arguments(False)
    gate[0, 0, 3] = bad
    with pytest.raises(ValueError, match="select_neurons: scores must be finite, got 1 NaN or Inf of 150"):
        system_chain(gate, *others, reaching=0.5).read()


def test_an_edit_that_is_not_active_may_be_broken(chosen):
    gate, up, weights, activation, active, *others = arguments()
    gate[2] = float("nan")
    assert not active[2]
    assert system_chain(gate, up, weights, activation, active, *others, within=0.5).read().matrix.isfinite().all()


@pytest.mark.parametrize("rule", [{}, {"reaching": 0.5, "within": 0.5}, {"within": 0.0}, {"reaching": 1.5}], ids=str)
def test_a_wrong_share_is_named(rule):
    with pytest.raises(ValueError, match=r"system_chain: give reaching or within, in \(0, 1\]"):
        system_chain(*arguments(), **rule)


@pytest.mark.parametrize("name", ["moment", "history", "past"])
def test_a_wrong_shape_is_named(name):
    given = list(arguments())
    given[{"moment": 5, "history": 7, "past": 8}[name]] = torch.zeros(150, 149, device=DEVICE)
    with pytest.raises(ValueError, match=f"system_chain: {name} must be"):
        system_chain(*given, reaching=0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", _dispatch.kinds("system_chain"))
def test_the_chain_is_captured_in_a_cuda_graph_and_replays_with_other_rows(name):
    """A capture fails at the first operation that waits for the device."""
    if not able(name):
        pytest.skip(f"{name} cannot run here")
    gate, *others = arguments()
    with _dispatch.backend(name):
        system_chain(gate, *others, reaching=0.6).read()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain = system_chain(gate, *others, reaching=0.6)
        gate.copy_(gate.flip(0) * 2)
        graph.replay()
        index, matrix = chain.read()
        expected = system_chain(gate, *others, reaching=0.6).read()
    assert torch.equal(index, expected.neurons)
    assert torch.equal(matrix, expected.matrix)
