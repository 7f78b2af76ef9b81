"""Losses, their gradient and scores of rows against autograd of the plain formulas."""

import pytest
import torch

from fastedit.model.logits import Head, LogitBuffer, log_probabilities, loss_rows, score_rows

N_SCORED, N_DRIFT, D_MODEL, VOCABULARY = 7, 3, 16, 101


def inputs(dtype=torch.float32, n_scored=N_SCORED, n_drift=N_DRIFT, seed=0, bias=False, softcap=None):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_scored + n_drift, D_MODEL, generator=generator)
    head = torch.randn(VOCABULARY, D_MODEL, generator=generator)
    targets = torch.randint(VOCABULARY, (n_scored,), generator=generator)
    weights = torch.rand(n_scored, generator=generator) + 0.1
    reference = torch.randn(n_drift, VOCABULARY, generator=generator).log_softmax(1)
    shift = torch.randn(VOCABULARY, generator=generator).to(dtype) if bias else None
    return rows.to(dtype), Head(head.to(dtype), shift, softcap), targets, weights, reference


def plain_logits(rows, head):
    logits = rows @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def plain_losses(rows, head, targets, weights, kl_factor, reference):
    """The definition in float64: -w log p(target), then kl_factor * sum p (log p - reference)."""
    log_p = plain_logits(rows, head).log_softmax(1)
    scored, drift = log_p[: len(targets)], log_p[len(targets) :]
    nll = -scored[torch.arange(len(targets)), targets] * weights.double()
    return torch.cat([nll, kl_factor * (drift.exp() * (drift - reference.double())).sum(1)])


@pytest.mark.parametrize(
    ("dtype", "loss_error", "grad_error"),
    [(torch.float32, 1e-5, 1e-5), (torch.float64, 1e-5, 1e-5), (torch.bfloat16, 0.05, 0.05)],
)
@pytest.mark.parametrize(("n_scored", "n_drift"), [(7, 3), (1, 1), (4, 0), (0, 2)])
@pytest.mark.parametrize("extras", [{}, {"bias": True}, {"softcap": 3.0}, {"bias": True, "softcap": 3.0}], ids=str)
def test_losses_and_gradient_are_those_of_autograd(n_scored, n_drift, dtype, loss_error, grad_error, extras):
    rows, head, targets, weights, reference = inputs(dtype, n_scored, n_drift, **extras)
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
    now = (rows @ head.weight.T).log_softmax(1)
    forward = torch.nn.functional.kl_div(reference, now, reduction="sum", log_target=True)
    backward = torch.nn.functional.kl_div(now, reference, reduction="sum", log_target=True)
    assert abs(float(forward - backward)) > 0.1
    torch.testing.assert_close(found.losses[0], forward, rtol=1e-5, atol=0)
    same = loss_rows(rows, head, targets, weights, 1.0, now, LogitBuffer())
    torch.testing.assert_close(same.losses, torch.zeros(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(same.grad, torch.zeros_like(same.grad), rtol=0, atol=1e-5)


def test_top1_says_whether_the_target_ranks_first():
    rows, head, targets, weights, reference = inputs()
    best = (rows @ head.weight.T).argmax(1)[:N_SCORED]
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
    rows, head, targets, weights, reference = inputs()
    given = (rows, head.weight, targets, weights, reference)
    copies = [part.clone() for part in given]
    loss_rows(rows, head, targets, weights, 0.3, reference, LogitBuffer())
    score_rows(rows[:N_SCORED], head, targets, LogitBuffer())
    for part, before in zip(given, copies, strict=True):
        assert torch.equal(part, before)


@pytest.mark.parametrize("extras", [{"bias": True}, {"softcap": 3.0}], ids=str)
def test_a_bias_and_a_cap_change_loss_and_gradient(extras):
    rows, head, targets, weights, reference = inputs(**extras)
    plain, found = (
        loss_rows(rows, some, targets, weights, 0.3, reference, LogitBuffer()) for some in (Head(head.weight), head)
    )
    assert float((plain.losses - found.losses).abs().max()) > 0.1
    assert float((plain.grad - found.grad).abs().max()) > 0.1
    scores = [score_rows(rows[:N_SCORED], some, targets, LogitBuffer()) for some in (Head(head.weight), head)]
    assert not torch.allclose(scores[0].log_prob, scores[1].log_prob)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_log_probabilities_and_the_best_token(dtype):
    rows, head, targets, _, _ = inputs(dtype, n_drift=0)
    found = score_rows(rows, head, targets, LogitBuffer())
    log_p = torch.mm(rows, head.weight.T).double().log_softmax(1)
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
        torch.testing.assert_close(buffer.logits(rows, head), rows @ head.weight.T)


def test_memory_is_taken_again_only_for_a_larger_product():
    buffer = LogitBuffer()
    rows, head, *_ = inputs()
    place = buffer.logits(rows, head).data_ptr()
    assert buffer.logits(rows[:3], head).data_ptr() == place
    assert buffer.logits(rows, head).data_ptr() == place
    assert buffer.logits(torch.cat([rows, rows]), head).shape == (2 * len(rows), VOCABULARY)


def test_log_probabilities_outlive_the_next_product():
    buffer = LogitBuffer()
    rows, head, *_ = inputs()
    kept = log_probabilities(rows, head, buffer)
    before = kept.clone()
    buffer.logits(rows * 2, head)
    assert torch.equal(kept, before)


def test_logits_have_the_dtype_that_is_asked_for():
    rows, head, *_ = inputs(torch.float64)
    narrow, wide = (LogitBuffer(dtype).logits(rows, head) for dtype in (torch.float32, torch.float64))
    assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(wide, plain_logits(rows, head), rtol=1e-12, atol=1e-12)
