"""Ensembles: the neurons of all layers whose score lies above one threshold (KNE, arXiv 2412.20637)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastedit.config import layers_in_short
from fastedit.ops.select_neurons import select_neurons


def ensemble(scores: Tensor, share: float, key_layers: int | Sequence[int] | None = None) -> Tensor:
    """The neurons with the round(share * n_layers * d_ff) largest scores, at least one; (n, 2) int64, ascending.

    scores: (n_layers, d_ff), signed
    share: p, share of all neurons
    key_layers: None = all layers; a number K: take the same number of neurons from the K layers with most members (the
        lowest layers among equals); a sequence: take them from these layers
    A row is (layer, neuron). Raises ValueError for layers that the scores do not have."""
    n_layers, d_ff = scores.shape
    count = max(1, round(share * scores.numel()))

    if key_layers is not None:
        layers = _most_members(scores, share, key_layers) if isinstance(key_layers, int) else key_layers
        if not layers or not all(0 <= layer < n_layers for layer in layers):
            raise ValueError(f"key_layers must lie in 0-{n_layers - 1}, got {layers_in_short(layers) or 'none'}")
        outside = torch.ones(n_layers, dtype=torch.bool)
        outside[torch.tensor(layers)] = False
        scores = scores.masked_fill(outside[:, None].to(scores.device), torch.finfo(scores.dtype).min)
        count = min(count, len(set(layers)) * d_ff)

    chosen = select_neurons(scores.flatten(), top_k=count)
    return torch.stack([chosen // d_ff, chosen % d_ff], dim=1)


def _most_members(scores: Tensor, share: float, n_key_layers: int) -> list[int]:
    """The layers that hold most members of the ensemble over all layers."""
    members = torch.bincount(ensemble(scores, share)[:, 0], minlength=scores.shape[0])
    return members.argsort(descending=True, stable=True)[:n_key_layers].tolist()
