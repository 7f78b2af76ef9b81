"""Scores, or the best of every slot, in one pass over W."""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.ops import cpp
from fastedit.ops.score_neurons import SCORE_DTYPES, BestNeurons, ScoreNeurons


def supports(args: ScoreNeurons) -> str | None:
    """Every dtype on the CPU; W is copied first where its rows have gaps."""
    return cpp.cannot(args.activations, args.weight, args.directions, dtypes=SCORE_DTYPES)


def worth(args: ScoreNeurons) -> str | None:
    """Where W need not be copied. Two threads of an AMD EPYC (Zen 4), float32, the best 5, against a product and topk
    of torch: 1.3 times for 4 slots and W (576, 1536), 3.5 for W (4096, 14336); 0.92 and 1.2 for 100 slots, but 1.8
    and 1.4 times the form that is used without kernels."""
    return None if args.weight.stride(1) == 1 else "W would be copied, which costs more than the scores"


def score_neurons(args: ScoreNeurons) -> Tensor | BestNeurons:
    """See :func:`fastedit.ops.score_neurons.score_neurons`."""
    top_k = args.top_k
    working = torch.promote_types(args.weight.dtype, torch.float32)
    activations = args.activations.to(working).contiguous()
    directions = args.directions.to(working).contiguous()
    weight = cpp.rows(args.weight)

    n_slots, d_ff = activations.shape
    width = top_k or d_ff
    values = activations.new_empty(n_slots, width)
    neurons = values.new_empty(n_slots, width if top_k else 0, dtype=torch.int64)
    cpp.compiled().score_neurons(
        *cpp.setting(),
        *map(cpp.address, (activations, weight, directions, values, neurons)),
        n_slots,
        *weight.shape,
        weight.stride(0),
        top_k or 0,
        cpp.TYPES[weight.dtype],
    )
    return BestNeurons(values, neurons) if top_k else values
