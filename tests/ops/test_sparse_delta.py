"""sparse_delta against the sum written out, its gradients against the formula, autograd and finite differences."""

import pytest
import torch

from fastedit.ops import _dispatch
from fastedit.ops.sparse_delta import (
    DeltaGrads,
    SparseDelta,
    sparse_delta,
    sparse_delta_grads,
    sparse_delta_grads_torch,
    sparse_delta_ref,
)
from fastedit.testing import CASES, Case, Factory, assert_close, assert_tolerance_bites, in_float64

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SMALL = Case("small", 5, 10, d_model=6)


def samples(inputs):
    """(row, slots of its sample) for every row."""
    rows, slots = inputs.row_starts.tolist(), inputs.slot_starts.tolist()
    for sample in range(len(rows) - 1):
        for row in range(rows[sample], rows[sample + 1]):
            yield row, range(slots[sample], slots[sample + 1])


def formula(inputs):
    activations, delta = in_float64((inputs.activations, inputs.delta))
    found = torch.zeros(activations.shape[0], delta.shape[1], dtype=torch.float64)
    for row, slots in samples(inputs):
        for slot in slots:
            found[row] += inputs.scale * activations[row, inputs.chosen[slot]] * delta[slot]
    return found


def formula_grads(inputs):
    activations, delta, grad = in_float64((inputs.activations, inputs.delta, inputs.grad))
    into_activations, into_delta = torch.zeros_like(activations), torch.zeros_like(delta)
    for row, slots in samples(inputs):
        for slot in slots:
            neuron = inputs.chosen[slot]
            into_delta[slot] += inputs.scale * activations[row, neuron] * grad[row]
            into_activations[row, neuron] += inputs.scale * (delta[slot] * grad[row]).sum()
    return into_activations, into_delta


def torch_result(inputs):
    """The definition in the dtype of delta, with autograd's gradients, rounded once."""
    delta = inputs.delta.clone().requires_grad_()
    activations = inputs.activations.to(delta.dtype, copy=True).requires_grad_()
    y = sparse_delta_ref(activations, *inputs[1:4], delta, inputs.scale)
    into_activations, into_delta = torch.autograd.grad(y, (activations, delta), inputs.grad)
    return y.detach(), into_activations.to(inputs.activations.dtype), into_delta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_follow_the_formula(case, dtype, backend, device, nan_scratch):
    inputs = Factory(case, dtype, device).sparse()
    found = (sparse_delta(*inputs[:-1]), *sparse_delta_grads(*inputs))
    dtypes = (inputs.delta.dtype, dtype, inputs.delta.dtype)
    for value, expected, wanted, result in zip(
        found, (formula(inputs), *formula_grads(inputs)), dtypes, torch_result(inputs), strict=True
    ):
        assert value.dtype == wanted
        assert_close(value, expected, result, "sparse_delta")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerance_bites(dtype, backend, device):
    inputs = Factory(SMALL, dtype, device).sparse()
    found = (sparse_delta(*inputs[:-1]), *sparse_delta_grads(*inputs))
    for value, expected, result in zip(
        found, (formula(inputs), *formula_grads(inputs)), torch_result(inputs), strict=True
    ):
        assert_tolerance_bites(value, expected, result, "sparse_delta")


def test_autograd_gives_the_gradients_in_float64(backend, device):
    inputs = Factory(SMALL, torch.float64, device).sparse()
    activations, delta = inputs.activations.requires_grad_(), inputs.delta.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, d: sparse_delta(a, *inputs[1:4], d, inputs.scale), (activations, delta), fast_mode=False
    )


def test_a_loss_of_half_precision_activations_reaches_both(backend, device):
    inputs = Factory(SMALL, torch.bfloat16, device).sparse()
    activations, delta = inputs.activations.requires_grad_(), inputs.delta.requires_grad_()
    (sparse_delta(activations, *inputs[1:4], delta, inputs.scale) * inputs.grad).sum().backward()
    with torch.no_grad():
        expected = sparse_delta_grads(*inputs)
    assert torch.equal(activations.grad, expected.activations)
    assert torch.equal(delta.grad, expected.delta)


def test_it_is_the_change_of_the_weight_when_one_sample_owns_all(backend, device):
    inputs = Factory(Case("shared", 1, 12, d_model=7, n_templates=9), torch.float64, device).sparse()
    assert len(inputs.chosen.unique()) < len(inputs.chosen)
    weight = torch.zeros(7, 12, dtype=torch.float64).index_add_(1, inputs.chosen, inputs.delta.T * inputs.scale)
    torch.testing.assert_close(sparse_delta(*inputs[:-1]), inputs.activations @ weight.T, rtol=1e-12, atol=1e-14)


def test_another_samples_slots_change_nothing(backend, device):
    inputs = Factory(SMALL, torch.float64, device).sparse()
    second = slice(int(inputs.slot_starts[1]), int(inputs.slot_starts[2]))
    rows = slice(int(inputs.row_starts[1]), int(inputs.row_starts[2]))
    assert second.start < second.stop
    assert rows.start < rows.stop
    before = sparse_delta(*inputs[:-1])
    inputs.delta[second] += 1
    changed = (sparse_delta(*inputs[:-1]) != before).any(1)
    assert changed[rows].all()
    assert not changed[: rows.start].any()
    assert not changed[rows.stop :].any()


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["activations", "delta", "grad"])
def test_a_diverged_sample_reaches_no_other(name, bad, backend, device):
    case = Case("several", 9, 10, d_model=70)
    clean, broken = Factory(case, device=device).sparse(), Factory(case, device=device).sparse()
    rows, slots = (range(int(starts[1]), int(starts[2])) for starts in (clean.row_starts, clean.slot_starts))
    assert len(rows) > 0
    assert len(slots) > 0
    own = slots if name == "delta" else rows
    getattr(broken, name)[own[0]] = bad

    for part, (found, expected) in enumerate(
        zip(
            (sparse_delta(*broken[:-1]), *sparse_delta_grads(*broken)),
            (sparse_delta(*clean[:-1]), *sparse_delta_grads(*clean)),
            strict=True,
        )
    ):
        mine = torch.zeros(len(found), dtype=torch.bool, device=device)
        mine[list(slots if part == 2 else rows)] = True
        torch.testing.assert_close(found[~mine], expected[~mine], rtol=1e-6, atol=1e-6)
        touched = {"activations": (0, 2), "delta": (0, 1), "grad": (1, 2)}[name]
        assert bool(found[mine].isfinite().all()) is (part not in touched)


@pytest.mark.parametrize("name", ["activations", "delta"])
def test_a_second_derivative_is_refused(name, backend, device):
    inputs = Factory(SMALL, device=device).sparse()
    leaf = getattr(inputs, name).requires_grad_()
    y = sparse_delta(*inputs[:-1])
    (first,) = torch.autograd.grad((y**2).sum(), leaf, create_graph=True)
    with torch.no_grad():
        grads = sparse_delta_grads(*inputs[:-1], 2 * y)
    torch.testing.assert_close(first.detach(), getattr(grads, name))
    with pytest.raises(RuntimeError, match="sparse_delta: has first derivatives only"):
        first.sum().backward()


def test_inputs_are_left_alone(backend, device):
    inputs = Factory(SMALL, device=device).sparse()
    before = [value.clone() for value in inputs if isinstance(value, torch.Tensor)]
    sparse_delta(*inputs[:-1])
    sparse_delta_grads(*inputs)
    for value, copy in zip((v for v in inputs if isinstance(v, torch.Tensor)), before, strict=True):
        assert torch.equal(value, copy)


def test_the_backward_runs_on_the_backend_of_the_forward(monkeypatch):
    """The choice is kept with the graph: the block that made it has ended when the gradient is computed."""
    inputs = Factory(SMALL).sparse()
    ran = []
    original = _dispatch.run

    def noting(op, args, function=None):
        ran.append((function or op, _dispatch.wanted()))
        return original(op, args, function)

    monkeypatch.setattr(_dispatch, "run", noting)
    monkeypatch.delenv("FASTEDIT_BACKEND", raising=False)
    delta = inputs.delta.requires_grad_()
    with _dispatch.backend("torch"):
        y = sparse_delta(inputs.activations, *inputs[1:4], delta)
    y.sum().backward()
    assert ran == [("sparse_delta", "torch"), ("sparse_delta_grads", "torch")]


def test_the_grads_are_a_named_pair():
    inputs = Factory(SMALL).sparse()
    assert isinstance(sparse_delta_grads_torch(SparseDelta(*inputs)), DeltaGrads)


@pytest.mark.parametrize(
    ("changes", "error", "wanted"),
    [
        pytest.param({"delta": torch.zeros(3, 2).half()}, TypeError, "delta must be", id="half_delta"),
        pytest.param({"activations": torch.zeros(4, 5).double()}, TypeError, "activations must be", id="double"),
        pytest.param({"activations": torch.zeros(4)}, ValueError, "activations must be", id="activations_1d"),
        pytest.param({"index": torch.zeros(2, dtype=torch.int64)}, ValueError, "index must be", id="index_short"),
        pytest.param({"index": torch.zeros(3)}, TypeError, "index must be", id="index_float"),
        pytest.param({"index": torch.tensor([0, 5, 1])}, ValueError, r"index must be in \[0, 5\)", id="index_high"),
        pytest.param({"index": torch.tensor([0, -1, 1])}, ValueError, r"index must be in \[0, 5\)", id="index_low"),
        pytest.param({"row_starts": torch.tensor([0, 4])}, ValueError, "slot_starts must be", id="starts_differ"),
        pytest.param({"row_starts": torch.tensor([0, 2, 3])}, ValueError, "row_starts must ascend", id="rows_left"),
        pytest.param({"row_starts": torch.tensor([0, 5, 4])}, ValueError, "row_starts must ascend", id="descend"),
        pytest.param({"row_starts": torch.tensor([1, 2, 4])}, ValueError, "row_starts must ascend", id="start_late"),
        pytest.param({"slot_starts": torch.tensor([0, 2, 9])}, ValueError, "slot_starts must ascend", id="slots_past"),
        pytest.param({"slot_starts": torch.tensor([0.0, 2, 3])}, TypeError, "slot_starts must be", id="starts_float"),
        pytest.param(
            {name: torch.zeros(0, dtype=torch.int64) for name in ("row_starts", "slot_starts")},
            ValueError,
            "row_starts must ascend",
            id="no_starts",
        ),
    ],
)
def test_wrong_arguments_are_named(changes, error, wanted):
    arguments = {
        "activations": torch.zeros(4, 5),
        "row_starts": torch.tensor([0, 2, 4]),
        "index": torch.tensor([0, 4, 1]),
        "slot_starts": torch.tensor([0, 1, 3]),
        "delta": torch.zeros(3, 2),
        **changes,
    }
    with pytest.raises(error, match=f"sparse_delta: {wanted}"):
        sparse_delta(**arguments)


def test_a_wrong_gradient_is_named():
    inputs = Factory(SMALL).sparse()
    with pytest.raises(ValueError, match="sparse_delta_grads: grad must be"):
        sparse_delta_grads(*inputs[:-1], inputs.grad[1:])
