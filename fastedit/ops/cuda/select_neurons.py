"""Exact selection by a radix select in one block; the indices and their number stay on the device until asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastedit.ops import cuda

RULES = ("top_k", "reaching", "within")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def supports(score: Tensor, top_k: int | None, reaching: float | None, within: float | None) -> str | None:
    """Scores of any floating-point dtype on a CUDA device, any stride."""
    return cuda.cannot(score, dtypes=DTYPES)


def worth(score: Tensor, top_k: int | None, reaching: float | None, within: float | None) -> str | None:
    """No GPU has timed it yet."""
    return cuda.unmeasured()


def select_on_device(
    score: Tensor, top_k: int | None, reaching: float | None, within: float | None
) -> tuple[Tensor, Tensor]:
    """(index (d_ff,) int64, status (3,) int64) in device memory, without waiting for the device.

    The first status[0] of index are the selected neurons; status[1] counts NaN and Inf scores, status[2] negative
    ones. Where status[1], or with a share of the mass status[2], is not 0, status[0] is 0."""
    index, status = empty(score)
    if score.shape[0] == 0:
        return index, status.zero_()
    cuda.launch("select_neurons", score, task(score, top_k, reaching, within, index, status))
    return index, status


def empty(score: Tensor) -> tuple[Tensor, Tensor]:
    """Where index and status of these scores go."""
    index = torch.empty(score.shape[0], dtype=torch.int64, device=score.device)
    return index, torch.empty(3, dtype=torch.int64, device=score.device)


def task(
    score: Tensor, top_k: int | None, reaching: float | None, within: float | None, index: Tensor, status: Tensor
) -> tuple[Any, ...]:
    """What the kernel is told; the tensors must live until it is enqueued."""
    size = score.shape[0]
    share = reaching if reaching is not None else within
    rule = "reaching" if reaching is not None else "within"
    if share is None or share >= 1:
        rule, top_k = "top_k", size if share is not None else top_k
    parts = (cuda.operand(score, 1), size, RULES.index(rule), top_k or 0, share or 0.0)
    return (*parts, index.data_ptr(), status.data_ptr())


def select_neurons(score: Tensor, top_k: int | None, reaching: float | None, within: float | None) -> Tensor:
    """See :func:`fastedit.ops.select_neurons.select_neurons`; waits for the device once."""
    index, status = select_on_device(score, top_k, reaching, within)
    size, broken, _ = status.tolist()
    if broken:
        raise ValueError(f"select_neurons: scores must be finite, got {broken} NaN or Inf of {score.numel()}")
    return index[:size]
