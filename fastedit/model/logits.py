"""Next-token distributions at scored rows: scores for evaluation, losses and their gradient for training.

The product with the unembedding is the largest of a step. So logits are computed for scored rows alone, once, in a
buffer that is reused, and training turns them into their gradient in place. Logits are float32 unless the buffer has
another dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """The unembedding: logits = rows W^T + bias, or c tanh((rows W^T + bias) / c) in a model that caps its logits.

    weight: W, (n_vocabulary, d_head); bias: (n_vocabulary,) or None; softcap: c or None
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


class RowScores(NamedTuple):
    """Per scored row, (n_rows,) each: the log-probability of its target, float32, and the arg-max token, int64."""

    log_prob: Tensor
    best: Tensor


class LossRows(NamedTuple):
    """Losses of rows, see `loss_rows`.

    losses: (n_scored + n_drift,) float32, weighted; top1: (n_scored,) bool, whether the target is the arg-max
    grad: (n_scored + n_drift, d_head) float32, gradient of the sum of the losses with respect to the rows
    """

    losses: Tensor
    top1: Tensor
    grad: Tensor


class LogitBuffer:
    """Memory for (n_rows, n_vocabulary) logits, reused from call to call.

    A fresh tensor of this size costs as much in page faults as the product that fills it.
    dtype: of the logits
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._flat = torch.empty(0, dtype=dtype)

    def logits(self, rows: Tensor, head: Head) -> Tensor:
        """Logits of rows (n_rows, d_head), (n_rows, n_vocabulary), in the buffer's dtype. Valid until the next call."""
        n_rows = rows.shape[0]
        n_vocabulary = head.weight.shape[0]
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
    """Score targets (n_rows,) int64 under the next-token distributions of rows (n_rows, d_head)."""
    logits = buffer.logits(rows, head)
    target_logits = logits.gather(1, targets.to(rows.device)[:, None])[:, 0]

    return RowScores(target_logits - torch.logsumexp(logits, 1), logits.argmax(1))


def loss_rows(
    rows: Tensor,
    head: Head,
    targets: Tensor,
    weights: Tensor,
    kl_factor: float,
    reference: Tensor,
    buffer: LogitBuffer,
) -> LossRows:
    """Losses of rows, and the gradient of their sum with respect to the rows.

    rows: (n_scored + n_drift, d_head), first the rows scored against a target, then those whose drift is measured
    targets: (n_scored,) int64 token ids; weights: (n_scored,) factors of their loss -log p(target)
    kl_factor: factor of the loss KL(p_now || p_reference) of the drift rows
    reference: (n_drift, n_vocabulary) log-probabilities of p_reference
    """
    n_scored = targets.shape[0]
    logits = buffer.logits(rows, head)

    # d logit / d (logit before the cap). Computed now, because the logits become their gradient in place.
    slope = None if head.softcap is None else 1 - (logits / head.softcap).square_()

    scored, drift = logits[:n_scored], logits[n_scored:]
    target_losses, top1 = _target_losses(scored, targets)
    divergence = _divergence(drift, reference)

    factors = torch.cat([weights, weights.new_full((drift.shape[0],), kl_factor)])
    if slope is not None:
        logits.mul_(slope)
    grad = torch.mm(logits.to(head.weight.dtype), head.weight).float() * factors[:, None]
    losses = torch.cat([target_losses * weights, divergence * kl_factor])

    return LossRows(losses, top1, grad)


def _target_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(-log p(target), whether the target is the arg-max) per row; the logits become the gradient of the former."""
    target_logits = logits.gather(1, targets[:, None])[:, 0]
    highest = logits.amax(1)

    torch.softmax(logits, dim=1, out=logits)
    # log sum exp = highest logit - log of the largest probability, without another pass over the row.
    log_sum = highest - logits.amax(1).log()

    # d(-log p(target)) / d logits = p - one_hot(target)
    logits[torch.arange(len(targets), device=logits.device), targets] -= 1

    return log_sum - target_logits, target_logits >= highest


def _divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(p || p_reference) per row; the logits become its gradient, p (log p - log p_reference - KL)."""
    torch.log_softmax(logits, dim=1, out=logits)
    gap = logits - reference
    probability = logits.exp_()
    divergence = (probability * gap).sum(1)

    probability.mul_(gap.sub_(divergence[:, None]))

    return divergence


def log_probabilities(rows: Tensor, head: Head, buffer: LogitBuffer) -> Tensor:
    """Log-probabilities over the vocabulary, (n_rows, n_vocabulary), in the buffer's dtype but not in its memory."""
    return torch.log_softmax(buffer.logits(rows, head), dim=1)
