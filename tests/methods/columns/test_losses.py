"""The losses of trained columns against their definition, and the closed-form gradient against autograd's."""

import pytest
import torch

from fastedit.methods.columns.config import TrainConfig
from fastedit.methods.columns.losses import ColumnLoss
from fastedit.model.logits import Head, LogitBuffer
from fastedit.model.tokens import TokenSequence

VOCABULARY, WIDTH = 23, 6
# (prompt tokens, target): one-token prompt (nothing to drift), repeated target tokens, several lengths.
TEXTS = [(4, (7,)), (1, (3, 9)), (6, (5, 5, 11)), (2, (1,))]


def sequences():
    made = []
    for n_prompt, target in TEXTS:
        ids = (*range(n_prompt), *target)
        scored = tuple(range(n_prompt - 1, n_prompt - 1 + len(target)))
        made.append(TokenSequence(ids, -1, scored, target))
    return made


def parts(seed, softcap):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n_rows = sum(n_prompt + len(target) for n_prompt, target in TEXTS)
    head = Head(normal(VOCABULARY, WIDTH), normal(VOCABULARY), softcap)
    return head, normal(n_rows, WIDTH), normal(n_rows, WIDTH)


def logits_of(rows, head):
    logits = rows @ head.weight.T + head.bias
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def definition(before, rows, head, config):
    """Each edit's losses and its worst token's, text by text."""
    start, losses, worsts = 0, [], []
    for n_prompt, target in TEXTS:
        stop = start + n_prompt + len(target)
        log_p = logits_of(rows[start:stop], head).log_softmax(-1)
        log_p0 = logits_of(before[start:stop], head).log_softmax(-1)
        token_losses = torch.stack([-log_p[n_prompt - 1 + j, token] for j, token in enumerate(target)])
        loss = token_losses.max() if config.reduce == "worst" else token_losses.mean()
        if n_prompt > 1:
            drift = (log_p0.exp() * (log_p0 - log_p)).sum(-1)[: n_prompt - 1]
            loss = loss + config.kl_factor * drift.mean()
        repeated = torch.stack([-torch.log(1 - log_p[-1, token].exp()) for token in target])
        losses.append(loss + config.repetition_factor * repeated.max())
        worsts.append(token_losses.max())
        start = stop
    return torch.stack(losses), torch.stack(worsts)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reduce": "mean"},
        {"kl_factor": 0.0},
        {"repetition_factor": 0.0},
        {"kl_factor": 0.0, "repetition_factor": 0.0},
    ],
    ids=["published", "mean", "no_drift", "no_repetition", "edit_alone"],
)
def test_losses_and_gradient_are_those_of_the_definition(changes, softcap):
    config = TrainConfig(**changes)
    head, before, rows = parts(1, softcap)
    loss, buffer = ColumnLoss(sequences(), config, torch.device("cpu")), LogitBuffer(torch.float64)
    loss(before, head, buffer)
    scored = loss(rows, head, buffer)

    rows.requires_grad_()
    losses, worst = definition(before, rows, head, config)
    (grad,) = torch.autograd.grad(losses.sum(), rows)
    torch.testing.assert_close(scored.losses, losses.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scored.worst, worst.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scored.grad, grad, rtol=1e-10, atol=1e-12)


def test_nothing_has_drifted_at_the_first_call():
    head, before, _ = parts(2, None)
    loss = ColumnLoss(sequences(), TrainConfig(repetition_factor=0.0), torch.device("cpu"))
    scored = loss(before, head, LogitBuffer(torch.float64))
    assert torch.equal(scored.losses, scored.worst)


def test_edits_that_go_on_keep_their_reference():
    head, before, rows = parts(3, None)
    loss, buffer = ColumnLoss(sequences(), TrainConfig(), torch.device("cpu")), LogitBuffer(torch.float64)
    loss(before, head, buffer)
    whole = loss(rows, head, buffer)

    mask = torch.tensor([True, False, True, False])
    lengths = torch.tensor([n_prompt + len(target) for n_prompt, target in TEXTS])
    rows_going = mask.repeat_interleave(lengths)
    going = loss.keep(mask)(rows[rows_going], head, buffer)
    torch.testing.assert_close(going.losses, whole.losses[mask])
    torch.testing.assert_close(going.grad, whole.grad[rows_going])


def test_a_target_that_is_certain_has_a_finite_repetition_loss():
    head, _, rows = parts(4, None)
    loss = ColumnLoss(sequences(), TrainConfig(), torch.device("cpu"))
    certain = Head(head.weight, torch.where(torch.arange(VOCABULARY) == 7, 1e4, 0.0).double())
    scored = loss(rows, certain, LogitBuffer(torch.float64))
    assert scored.losses.isfinite().all()
    assert scored.grad.isfinite().all()


def test_a_nan_row_shows_in_its_own_edit_only():
    head, _, rows = parts(5, None)
    rows[1] = torch.nan
    rows[3] = torch.nan
    scored = ColumnLoss(sequences(), TrainConfig(), torch.device("cpu"))(rows, head, LogitBuffer(torch.float64))
    assert scored.worst.isnan().tolist() == [True, False, False, False]
