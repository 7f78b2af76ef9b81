"""The neurons of all layers whose score lies above one threshold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastedit.ops.select_neurons import select_neurons


def ensemble(scores: Tensor, share: float, key_layers: int | Sequence[int] | None = None) -> Tensor:
    """Neurons above one threshold for all layers, (n, 2) int64 (layer, neuron), ascending. scores: (n_layers, d_ff).

    The round(share * n_layers * d_ff) largest scores, signed, at least one. key_layers: K: the same number of neurons
    again, out of the K layers that hold most of them (the lowest among equals); or those layers.
    Raises ValueError for layers that the scores do not have."""
    n_layers, d_ff = scores.shape
    count = max(1, round(share * scores.numel()))
    if key_layers is not None:
        if isinstance(key_layers, int):
            held = torch.bincount(ensemble(scores, share)[:, 0], minlength=n_layers)
            key_layers = held.argsort(descending=True, stable=True)[:key_layers].tolist()
        if not key_layers or not all(0 <= layer < n_layers for layer in key_layers):
            raise ValueError(f"key_layers must lie in 0-{n_layers - 1}, got {list(key_layers)}")
        outside = torch.ones(n_layers, dtype=torch.bool)
        outside[torch.tensor(key_layers)] = False
        scores = scores.masked_fill(outside[:, None].to(scores.device), torch.finfo(scores.dtype).min)
        count = min(count, len(set(key_layers)) * d_ff)
    chosen = select_neurons(scores.flatten(), top_k=count)
    return torch.stack([chosen // d_ff, chosen % d_ff], dim=1)
