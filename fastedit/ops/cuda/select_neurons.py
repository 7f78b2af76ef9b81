"""Exact selection by a radix select in one block; indices and their number stay on the device until they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.ops import cuda
from fastedit.ops._check import apart
from fastedit.ops.select_neurons import SelectNeurons

RULES = ("top_k", "reaching", "within")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def supports(args: SelectNeurons) -> str | None:
    """Scores of any floating-point dtype on a CUDA device, any stride."""
    return apart(args) or cuda.cannot(args.score, dtypes=DTYPES)


def worth(args: SelectNeurons) -> str | None:
    """No GPU has timed it yet."""
    return cuda.unmeasured()


def select_neurons(args: SelectNeurons) -> Tensor:
    """See :func:`fastedit.ops.select_neurons.select_neurons`; waits for the device once."""
    index, status = select_on_device(args)
    size, broken, _ = status.tolist()
    if broken:
        raise ValueError(f"select_neurons: scores must be finite, got {broken} NaN or Inf of {args.score.numel()}")
    return index[:size]


def select_on_device(args: SelectNeurons) -> tuple[Tensor, Tensor]:
    """(index (d_ff,) int64, status (3,) int64) in device memory, without waiting for the device.

    The first status[0] of index are the selected neurons; status[1] counts NaN and Inf scores, status[2] negative
    ones. Where status[1], or with a share of the mass status[2], is not 0, status[0] is 0."""
    index, status = empty(args.score)
    if args.score.shape[0] == 0:
        return index, status.zero_()
    cuda.launch("select_neurons", args.score, task(args, index, status))
    return index, status


def empty(score: Tensor) -> tuple[Tensor, Tensor]:
    """Where index and status of these scores go."""
    index = torch.empty(score.shape[0], dtype=torch.int64, device=score.device)
    return index, torch.empty(3, dtype=torch.int64, device=score.device)


def task(args: SelectNeurons, index: Tensor, status: Tensor) -> tuple[cuda.Argument, ...]:
    """The kernel's arguments; the tensors must live until it is enqueued."""
    size, share, top_k = args.score.shape[0], args.share, args.top_k
    rule = "within" if args.reaching is None else "reaching"
    if share is None:
        rule = "top_k"
    elif share >= 1:
        rule, top_k = "top_k", size

    parts = (cuda.operand(args.score, 1), size, RULES.index(rule), top_k or 0, share or 0.0)
    return (*parts, index.data_ptr(), status.data_ptr())
