"""The published MEMIT and AlphaEdit procedures beside NSE's (published.py), with the same values, keys and sweeps.

One pass over the edited layers writes every edit and every neuron. The residual z - h is measured again at each layer,
and R is its share for this layer: the residual divided by the layers left. With the keys K (n_edits, d_ff), the second
moment C, and the sum H of k k^T over earlier edits:

    MEMIT      W += R^T K (lambda C + [H] + K^T K)^-1         float64; H only with memory
    AlphaEdit  W += ((P (K^T K + H) + b I)^-1 P K^T R)^T      float32, a general d_ff x d_ff solve; P the projector

After the last write both compute the keys of all requests once more, as the released AlphaEdit does for its history.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from published import PublishedSettings, Request, compute_hidden, compute_keys, solve_update, write_layer
from torch import Tensor

Update = Callable[[int, Tensor, Tensor], Tensor]


def write_once(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    values: Tensor,
    templates: Sequence[str],
    layers: Sequence[int],
    update: Update,
    history: dict[int, Tensor] | None,
) -> dict[int, Tensor]:
    """Write one batch in place; returns what was added to each layer, (d_model, d_ff).

    values: z, (n_edits, d_model)
    update: (layer, keys, shares of the residual) -> (d_model, d_ff)
    history: gains K^T K of the keys after the edit; None = no history"""
    weights = {layer: model.model.layers[layer].mlp.down_proj.weight for layer in layers}
    totals = {layer: torch.zeros_like(weight, requires_grad=False) for layer, weight in weights.items()}
    for place, layer in enumerate(layers):
        keys = compute_keys(model, tokenizer, requests, templates, layer)
        hidden = compute_hidden(model, tokenizer, requests, layers[-1])
        shares = (values - hidden) / (len(layers) - place)
        everything = torch.arange(keys.shape[1], device=keys.device)
        write_layer(weights[layer], totals[layer], update(layer, keys, shares), everything)

    if history is not None:
        for layer in layers:
            keys = compute_keys(model, tokenizer, requests, templates, layer)
            history[layer] += (keys.T @ keys).to(history[layer])
    return totals


def memit_batch(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    values: Tensor,
    templates: Sequence[str],
    second_moments: dict[int, Tensor],
    settings: PublishedSettings,
    history: dict[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """MEMIT's batch; arguments as for `write_once`. With `history`, (d_ff, d_ff) float32 per layer, the outputs for
    past keys are preserved."""

    def update(layer: int, keys: Tensor, shares: Tensor) -> Tensor:
        moment = second_moments[layer].to(keys.device)
        past = torch.zeros_like(moment) if history is None else history[layer].to(keys.device)
        chosen = torch.arange(keys.shape[1], device=keys.device)
        return solve_update(keys, shares, moment, past, chosen, settings.covariance_weight)

    return write_once(model, tokenizer, requests, values, templates, settings.layers, update, history)


def projector(second_moment: Tensor, threshold: float) -> Tensor:
    """P, (d_ff, d_ff) float32, onto the singular vectors of C whose singular values are below the threshold."""
    vectors, singular, _ = torch.linalg.svd(second_moment.double())
    null = vectors[:, singular < threshold]
    return (null @ null.T).float()


def alphaedit_batch(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    values: Tensor,
    templates: Sequence[str],
    projectors: dict[int, Tensor],
    history: dict[int, Tensor],
    layers: Sequence[int],
    ridge: float,
) -> dict[int, Tensor]:
    """AlphaEdit's batch. projectors and history: one (d_ff, d_ff) float32 matrix per layer; ridge: b."""

    def update(layer: int, keys: Tensor, shares: Tensor) -> Tensor:
        project, past = projectors[layer].to(keys), history[layer].to(keys)
        system = project @ (keys.T @ keys + past) + ridge * torch.eye(len(project), dtype=keys.dtype)
        return torch.linalg.solve(system, project @ keys.T @ shares.to(keys)).T

    return write_once(model, tokenizer, requests, values, templates, layers, update, history)
