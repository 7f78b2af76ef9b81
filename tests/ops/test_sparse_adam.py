"""sparse_adam against the formula in Python numbers and against torch.optim.Adam, row by row."""

import math

import pytest
import torch

from fastedit.ops.sparse_adam import AdamSettings, sparse_adam, sparse_adam_ref
from fastedit.testing import (
    CASES,
    Case,
    Factory,
    assert_close,
    assert_tolerance_bites,
    in_float64,
    relative_error,
)

DTYPES = (torch.float32, torch.float64)
SETTINGS = AdamSettings(lr=0.1, beta1=0.8, beta2=0.99, eps=1e-6)
SMALL = Case("small", 7, 1, d_model=12)
RESULTS = ("delta", "moment1", "moment2")


def norm(row):
    return math.sqrt(sum(value * value for value in row))


def formula_row(delta, grad, moment1, moment2, decay, radius, step):
    """One row as lists of floats, as the docstring has it."""
    length = norm(delta)
    if length > 0:
        grad = [g + decay * value / length for g, value in zip(grad, delta, strict=True)]
    moment1 = [SETTINGS.beta1 * m + (1 - SETTINGS.beta1) * g for m, g in zip(moment1, grad, strict=True)]
    moment2 = [SETTINGS.beta2 * v + (1 - SETTINGS.beta2) * g**2 for v, g in zip(moment2, grad, strict=True)]
    moved = []
    for value, m, v in zip(delta, moment1, moment2, strict=True):
        root = math.sqrt(v / (1 - SETTINGS.beta2**step))
        moved.append(value - SETTINGS.lr * (m / (1 - SETTINGS.beta1**step)) / (root + SETTINGS.eps))
    shrink = min(1.0, radius / norm(moved)) if norm(moved) > 0 else 1.0
    return [value * shrink for value in moved], moment1, moment2


def formula(inputs, step):
    delta, grad, moment1, moment2, decay, radius = in_float64(inputs)
    results = torch.zeros(3, *delta.shape, dtype=torch.float64)
    for row in range(delta.shape[0]):
        state = [tensor[row].tolist() for tensor in (delta, grad, moment1, moment2)]
        weight = 0.0 if decay is None else float(decay[row])
        bound = math.inf if radius is None else float(radius[row])
        results[:, row] = torch.tensor(formula_row(*state, weight, bound, step), dtype=torch.float64)
    return results


def stepped(inputs, step):
    """(found, torch's result) for delta and the two moments."""
    state, bounds = inputs[:4], inputs[4:]
    torch_results = sparse_adam_ref(*state, step, SETTINGS, *bounds)
    sparse_adam(*state, step, SETTINGS, *bounds)
    return list(zip((inputs.delta, inputs.moment1, inputs.moment2), torch_results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_step_follows_the_formula(case, dtype, backend, device, nan_scratch):
    inputs = Factory(case, dtype, device).adam()
    expected = formula(inputs, 4)
    for (found, torch_result), wanted in zip(stepped(inputs, 4), expected, strict=True):
        assert_close(found, wanted, torch_result, "sparse_adam")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerance_bites(dtype, backend, device):
    inputs = Factory(SMALL, dtype, device).adam()
    expected = formula(inputs, 1)
    for (found, torch_result), wanted in zip(stepped(inputs, 1), expected, strict=True):
        assert_tolerance_bites(found, wanted, torch_result, "sparse_adam")


@pytest.mark.parametrize("optional", [True, False], ids=["penalty_and_bound", "bare"])
def test_six_steps_are_those_of_torch_optim_adam(optional, backend):
    n, d = 4, 9
    generator = torch.Generator().manual_seed(3)
    centre = torch.randn(n, d, generator=generator, dtype=torch.float64)
    decay = torch.tensor([0.0, 0.3, 2.0, 0.3], dtype=torch.float64) if optional else None
    radius = torch.tensor([9.0, 0.25, 0.4, 9.0], dtype=torch.float64) if optional else None
    start = torch.zeros(n, d, dtype=torch.float64)
    start[3] = 1.0
    delta, moment1, moment2 = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    rows = [row.clone().requires_grad_() for row in start]
    theirs = [torch.optim.Adam([row], lr=0.1, betas=(0.8, 0.99), eps=1e-6) for row in rows]
    for step in range(1, 7):
        sparse_adam(delta, 2 * (delta - centre), moment1, moment2, step, SETTINGS, decay, radius)
        for number, (row, optimizer) in enumerate(zip(rows, theirs, strict=True)):
            optimizer.zero_grad()
            loss = ((row - centre[number]) ** 2).sum()
            (loss if decay is None else loss + decay[number] * row.norm()).backward()
            optimizer.step()
            if radius is not None:
                with torch.no_grad():
                    row.mul_(min(1.0, float(radius[number] / row.norm())))
        torch.testing.assert_close(delta, torch.stack([row.detach() for row in rows]), rtol=1e-12, atol=1e-14)
    for name, mine in (("exp_avg", moment1), ("exp_avg_sq", moment2)):
        wanted = torch.stack([optimizer.state[row][name] for row, optimizer in zip(rows, theirs, strict=True)])
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-14)


def test_the_penalty_has_no_gradient_at_zero(backend):
    zeros, grad = torch.zeros(2, 3), torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    with_penalty, without = ([zeros.clone() for _ in range(3)] for _ in range(2))
    sparse_adam(with_penalty[0], grad, *with_penalty[1:], 1, SETTINGS, torch.full((2,), 5.0))
    sparse_adam(without[0], grad, *without[1:], 1, SETTINGS)
    for mine, plain in zip(with_penalty, without, strict=True):
        assert torch.equal(mine, plain)
    assert not with_penalty[0][1].any()
    assert with_penalty[0][0].sign().tolist() == [-1.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_shortens_long_rows_only_and_leaves_the_moments(dtype, backend, device):
    inputs = Factory(SMALL, dtype, device).adam()
    bounded, free = ([tensor.clone() for tensor in inputs[:4]] for _ in range(2))
    sparse_adam(*bounded, 3, SETTINGS, inputs.decay, inputs.radius)
    sparse_adam(*free, 3, SETTINGS, inputs.decay)
    long = free[0].norm(dim=1) > inputs.radius
    assert long.any()
    assert not long.all()
    assert torch.equal(bounded[0][~long], free[0][~long])
    torch.testing.assert_close(bounded[0][long].norm(dim=1), inputs.radius[long])
    direction = torch.nn.functional.cosine_similarity(bounded[0], free[0])
    torch.testing.assert_close(direction, torch.ones_like(direction))
    assert torch.equal(bounded[2], free[2])
    assert torch.equal(bounded[3], free[3])


@pytest.mark.parametrize("bounded", ["penalty", "bound", "both", "bare"])
@pytest.mark.parametrize("grad_size", [1e-39, 1.0, 1e20])
@pytest.mark.parametrize("size", [1e-39, 1.0, 1e20])
def test_tiny_and_huge_rows_and_gradients_step_as_in_float64(size, grad_size, bounded, backend, device):
    """Squares of 1e-39 vanish in float32, those of 1e20 overflow."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2, 3, 40, generator=generator, dtype=torch.float64), dim=-1)
    delta, grad = (directions[0] * size).float(), (directions[1] * grad_size).float()
    state = [delta, grad, torch.zeros(3, 40), torch.zeros(3, 40)]
    decay = torch.full((3,), 0.5) if bounded in ("penalty", "both") else None
    radius = torch.full((3,), size / 2) if bounded in ("bound", "both") else None
    settings = AdamSettings(lr=0.1)
    expected = sparse_adam_ref(*in_float64(state), 1, settings, *in_float64((decay, radius)))

    state = [value.to(device) for value in state]
    limits = [None if value is None else value.to(device) for value in (decay, radius)]
    sparse_adam(*state, 1, settings, *limits)

    # Below 1e-38 float32 has fewer digits.
    rtol = 1e-5 if min(size, grad_size) > 1e-38 else 2e-4
    for found, wanted in zip((state[0], state[2]), (expected[0], expected[1]), strict=True):
        assert relative_error(found, wanted) <= rtol


def test_a_bound_of_zero_and_a_row_of_zeros_are_no_division_by_zero(backend):
    delta, moment1, moment2 = torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)
    delta[1] = 0
    sparse_adam(delta, torch.zeros(2, 3), moment1, moment2, 1, SETTINGS, torch.ones(2), torch.zeros(2))
    assert torch.equal(delta, torch.zeros(2, 3))


@pytest.mark.parametrize("case", [SMALL, Case("smollm2", 24, 1, d_model=576)], ids=str)
def test_a_row_alone_is_the_row_in_the_batch_bit_for_bit(case, backend, device):
    inputs = Factory(case, device=device).adam()
    alone = [[tensor[row : row + 1].clone() for tensor in inputs] for row in range(case.n_edits)]
    sparse_adam(*inputs[:4], 2, SETTINGS, *inputs[4:])
    for row, own in enumerate(alone):
        sparse_adam(*own[:4], 2, SETTINGS, *own[4:])
        for batch, single in zip(inputs, own, strict=True):
            assert torch.equal(batch[row], single[0])


def test_a_broken_row_does_not_reach_the_others(backend, device):
    inputs, broken = Factory(SMALL, device=device).adam(), Factory(SMALL, device=device).adam()
    broken.grad[2] = float("nan")
    for state in (inputs, broken):
        sparse_adam(*state[:4], 2, SETTINGS, *state[4:])
    assert broken.delta[2].isnan().all()
    others = [0, 1, 3, 4, 5, 6]
    for name in RESULTS:
        assert torch.equal(getattr(inputs, name)[others], getattr(broken, name)[others])


def test_gradient_penalty_and_bound_are_left_alone(backend, device):
    inputs = Factory(SMALL, device=device).adam()
    before = [tensor.clone() for tensor in inputs]
    sparse_adam(*inputs[:4], 2, SETTINGS, *inputs[4:])
    for name, value, copy in zip(inputs._fields, inputs, before, strict=True):
        assert torch.equal(value, copy) is (name not in RESULTS)


@pytest.mark.parametrize(
    ("changes", "error", "argument"),
    [
        pytest.param({"grad": torch.zeros(7, 11)}, ValueError, "grad", id="grad_narrow"),
        pytest.param({"grad": torch.zeros(7, 12).double()}, TypeError, "grad", id="grad_double"),
        pytest.param({"moment1": torch.zeros(7, 1)}, ValueError, "moment1", id="moment1_one_column"),
        pytest.param({"moment2": torch.zeros(7, 12).half()}, TypeError, "moment2", id="moment2_half"),
        pytest.param({"decay": torch.zeros(7, 1)}, ValueError, "decay", id="decay_2d"),
        pytest.param({"radius": torch.zeros(6)}, ValueError, "radius", id="radius_short"),
        pytest.param({"radius": torch.zeros(7).double()}, TypeError, "radius", id="radius_double"),
        pytest.param({"step": 0}, ValueError, "step", id="step_zero"),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(changes, error, argument):
    arguments = {**Factory(SMALL).adam()._asdict(), "step": 1, "settings": SETTINGS, **changes}
    before = arguments["delta"].clone()
    with pytest.raises(error, match=f"sparse_adam: {argument} must be"):
        sparse_adam(**arguments)
    assert torch.equal(arguments["delta"], before)
