"""Next-token distributions at scored rows only: losses with their gradient, and what evaluation reads.

The vocabulary projection is the largest single product of a step, so logits are computed once, for the rows that are
scored and no others, in one buffer that is reused and turned into their own gradient in place. float32 throughout,
where no other dtype is asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """From the rows that a model's final norm gives to logits: rows W^T + bias, and where a model caps its logits at
    c, c tanh((rows W^T + bias) / c).

    weight: (n_vocabulary, d_head); bias: (n_vocabulary,) or None; softcap: c or None
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


class RowScores(NamedTuple):
    """Per scored row: log-probability of its target (float32), and the arg-max token (int64)."""

    log_prob: Tensor
    best: Tensor


class LossRows(NamedTuple):
    """Per scored row its weighted loss and whether its target ranks first; grad: (n_rows, d_head), of their sum."""

    losses: Tensor
    top1: Tensor
    grad: Tensor


class LogitBuffer:
    """Scratch for (n_rows, n_vocabulary) logits: a fresh one of this size costs as much in page faults as the
    product that fills it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """dtype: of the logits"""
        self._flat = torch.empty(0, dtype=dtype)

    def logits(self, rows: Tensor, head: Head) -> Tensor:
        """Logits of rows (n_rows, d_head) in the buffer's dtype, (n_rows, n_vocabulary), valid until the next call."""
        n_rows, n_vocabulary = rows.shape[0], head.weight.shape[0]
        dtype = self._flat.dtype
        if self._flat.numel() < n_rows * n_vocabulary or self._flat.device != rows.device:
            self._flat = torch.empty(n_rows * n_vocabulary, device=rows.device, dtype=dtype)
        out = self._flat[: n_rows * n_vocabulary].view(n_rows, n_vocabulary)
        if rows.dtype == head.weight.dtype == dtype:
            torch.mm(rows, head.weight.T, out=out)
        else:
            out.copy_(torch.mm(rows, head.weight.T))
        if head.bias is not None:
            out.add_(head.bias)
        if head.softcap is not None:
            out.div_(head.softcap).tanh_().mul_(head.softcap)
        return out


def score_rows(rows: Tensor, head: Head, targets: Tensor, buffer: LogitBuffer) -> RowScores:
    """Score targets (n_rows,) int64 under the distributions of rows (n_rows, d_head)."""
    logits = buffer.logits(rows, head)
    picked = logits.gather(1, targets.to(rows.device)[:, None])[:, 0]
    return RowScores(picked - torch.logsumexp(logits, 1), logits.argmax(1))


def loss_rows(
    rows: Tensor,
    head: Head,
    targets: Tensor,
    weights: Tensor,
    kl_factor: float,
    reference: Tensor,
    buffer: LogitBuffer,
) -> LossRows:
    """Losses of the rows and the gradient of their sum with respect to the rows.

    rows: (n_scored + n_drift, d_head): first the rows scored against a target, then those whose drift is measured
    targets, weights: (n_scored,) token ids and factors of -log p(target)
    reference: (n_drift, n_vocabulary) log-probabilities; loss kl_factor * KL(p_now || reference)
    """
    n_scored = targets.shape[0]
    logits = buffer.logits(rows, head)
    # d logit / d (logit before the cap), kept aside: the logits become their own gradient in place.
    slope = None if head.softcap is None else 1 - (logits / head.softcap).square_()
    scored, drift = logits[:n_scored], logits[n_scored:]
    picked = scored.gather(1, targets[:, None])[:, 0]
    highest = scored.amax(1)
    torch.softmax(scored, dim=1, out=scored)
    # The largest probability gives back log sum exp without another pass over the row.
    log_sum = highest - scored.amax(1).log()
    scored_losses = (log_sum - picked) * weights
    scored[torch.arange(n_scored, device=rows.device), targets] -= 1

    torch.log_softmax(drift, dim=1, out=drift)
    gap = drift - reference
    probability = drift.exp_()
    divergence = (probability * gap).sum(1)
    probability.mul_(gap.sub_(divergence[:, None]))

    factors = torch.cat([weights, weights.new_full((drift.shape[0],), kl_factor)])
    if slope is not None:
        logits.mul_(slope)
    grad = torch.mm(logits.to(head.weight.dtype), head.weight).float() * factors[:, None]
    losses = torch.cat([scored_losses, divergence * kl_factor])
    return LossRows(losses, picked >= highest, grad)


def log_probabilities(rows: Tensor, head: Head, buffer: LogitBuffer) -> Tensor:
    """log p over the vocabulary, (n_rows, n_vocabulary) float32, as a copy."""
    return torch.log_softmax(buffer.logits(rows, head), dim=1)
