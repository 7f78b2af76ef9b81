"""Losses, their gradient and scores of rows against autograd of the plain formulas."""

import pytest
import torch

from fastedit.scoring import LogitBuffer, log_probabilities, loss_rows, score_rows

N_SCORED, N_DRIFT, D_MODEL, VOCABULARY = 7, 3, 16, 101


def inputs(dtype=torch.float32, n_scored=N_SCORED, n_drift=N_DRIFT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_scored + n_drift, D_MODEL, generator=generator)
    head = torch.randn(VOCABULARY, D_MODEL, generator=generator)
    targets = torch.randint(VOCABULARY, (n_scored,), generator=generator)
    weights = torch.rand(n_scored, generator=generator) + 0.1
    reference = torch.randn(n_drift, VOCABULARY, generator=generator).log_softmax(1)
    return rows.to(dtype), head.to(dtype), targets, weights, reference


def plain_losses(rows, head, targets, weights, kl_factor, reference):
    """The definition in float64: -w log p(target), then kl_factor * sum p (log p - reference)."""
    log_p = (rows @ head.double().T).log_softmax(1)
    scored, drift = log_p[: len(targets)], log_p[len(targets) :]
    nll = -scored[torch.arange(len(targets)), targets] * weights.double()
    return torch.cat([nll, kl_factor * (drift.exp() * (drift - reference.double())).sum(1)])


@pytest.mark.parametrize(
    ("dtype", "loss_error", "grad_error"),
    [(torch.float32, 1e-5, 1e-5), (torch.float64, 1e-5, 1e-5), (torch.bfloat16, 0.05, 0.05)],
)
@pytest.mark.parametrize(("n_scored", "n_drift"), [(7, 3), (1, 1), (4, 0), (0, 2)])
def test_losses_and_gradient_are_those_of_autograd(n_scored, n_drift, dtype, loss_error, grad_error):
    rows, head, targets, weights, reference = inputs(dtype, n_scored, n_drift)
    found = loss_rows(rows, head, targets, weights, 0.3, reference, LogitBuffer())
    leaf = rows.double().requires_grad_()
    wanted = plain_losses(leaf, head, targets, weights, 0.3, reference)
    (gradient,) = torch.autograd.grad(wanted.sum(), leaf)
    assert found.losses.dtype == found.grad.dtype == torch.float32
    scale = float(wanted.detach().abs().max())
    torch.testing.assert_close(found.losses.double(), wanted.detach(), rtol=0, atol=loss_error * scale)
    scale = float(gradient.abs().max())
    torch.testing.assert_close(found.grad.double(), gradient, rtol=0, atol=grad_error * scale)


def test_the_divergence_is_of_the_present_distribution_from_the_reference():
    rows, head, targets, weights, reference = inputs(n_scored=0, n_drift=1)
    found = loss_rows(rows, head, targets, weights, 1.0, reference, LogitBuffer())
    now = (rows @ head.T).log_softmax(1)
    forward = torch.nn.functional.kl_div(reference, now, reduction="sum", log_target=True)
    backward = torch.nn.functional.kl_div(now, reference, reduction="sum", log_target=True)
    assert abs(float(forward - backward)) > 0.1
    torch.testing.assert_close(found.losses[0], forward, rtol=1e-5, atol=0)
    same = loss_rows(rows, head, targets, weights, 1.0, now, LogitBuffer())
    torch.testing.assert_close(same.losses, torch.zeros(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(same.grad, torch.zeros_like(same.grad), rtol=0, atol=1e-5)


def test_top1_says_whether_the_target_ranks_first():
    rows, head, targets, weights, reference = inputs()
    best = (rows @ head.T).argmax(1)[:N_SCORED]
    mixed = torch.where(torch.arange(N_SCORED) % 2 == 0, best, (best + 1) % VOCABULARY)
    found = loss_rows(rows, head, mixed, weights, 0.3, reference, LogitBuffer())
    assert found.top1.tolist() == [i % 2 == 0 for i in range(N_SCORED)]
    assert not bool((targets == best).all())


def test_very_large_logits_stay_finite():
    rows, head, targets, weights, reference = inputs()
    found = loss_rows(rows * 300, head, targets, weights, 0.3, reference, LogitBuffer())
    wanted = plain_losses(rows.double() * 300, head, targets, weights, 0.3, reference)
    assert bool(torch.isfinite(found.grad).all())
    torch.testing.assert_close(found.losses.double(), wanted, rtol=1e-4, atol=1e-3)


def test_inputs_are_left_alone():
    given = inputs()
    copies = [part.clone() for part in given]
    rows, head, targets, weights, reference = given
    loss_rows(rows, head, targets, weights, 0.3, reference, LogitBuffer())
    score_rows(rows[:N_SCORED], head, targets, LogitBuffer())
    for part, before in zip(given, copies, strict=True):
        assert torch.equal(part, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_log_probabilities_and_the_best_token(dtype):
    rows, head, targets, _, _ = inputs(dtype, n_drift=0)
    found = score_rows(rows, head, targets, LogitBuffer())
    log_p = torch.mm(rows, head.T).double().log_softmax(1)
    torch.testing.assert_close(found.log_prob.double(), log_p.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-5)
    assert torch.equal(found.best, log_p.argmax(1))
    whole = log_probabilities(rows, head, LogitBuffer())
    torch.testing.assert_close(whole.double(), log_p, rtol=0, atol=1e-5)


def test_one_buffer_serves_smaller_and_larger_products():
    buffer = LogitBuffer()
    for count in (5, 2, 5, 9, 1):
        rows, head, targets, weights, reference = inputs(n_scored=count, n_drift=1, seed=count)
        ours = loss_rows(rows, head, targets, weights, 0.3, reference, buffer)
        fresh = loss_rows(rows, head, targets, weights, 0.3, reference, LogitBuffer())
        for one, other in zip(ours, fresh, strict=True):
            assert torch.equal(one, other)
        torch.testing.assert_close(buffer.product(rows, head), rows @ head.T)


def test_memory_is_taken_again_only_for_a_larger_product():
    buffer = LogitBuffer()
    rows, head, *_ = inputs()
    place = buffer.product(rows, head).data_ptr()
    assert buffer.product(rows[:3], head).data_ptr() == place
    assert buffer.product(rows, head).data_ptr() == place
    assert buffer.product(torch.cat([rows, rows]), head).shape == (2 * len(rows), VOCABULARY)


def test_log_probabilities_outlive_the_next_product():
    buffer = LogitBuffer()
    rows, head, *_ = inputs()
    kept = log_probabilities(rows, head, buffer)
    before = kept.clone()
    buffer.product(rows * 2, head)
    assert torch.equal(kept, before)
