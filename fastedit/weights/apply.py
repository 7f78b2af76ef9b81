"""Turns a solved update into a write, inside a trial, after checking it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.weights.trial import Trial


class RejectedUpdate(ValueError):
    """An update that would leave NaN or Inf in a weight. `rows` are the positions in the batch it came from."""

    def __init__(self, layer: int, rows: list[int], what: str) -> None:
        super().__init__(f"layer {layer}: {what}")
        self.layer, self.rows = layer, rows


def apply_update(
    trial: Trial, layer: int, index: Tensor | None, residual: Tensor, solution: Tensor, rows: Tensor
) -> float:
    """W[:, S] += R^T X^T inside `trial`; returns the Frobenius norm of the update.

    residual: (n, d_model); solution: (k, n); rows: (n,) position in the batch of each of them, for the message
    Raises RejectedUpdate, with nothing written, when residual or solution hold NaN or Inf, or the weight would."""
    broken = ~(torch.isfinite(residual).all(1) & torch.isfinite(solution).all(0))
    if bool(broken.any()):
        raise RejectedUpdate(layer, rows[broken].tolist(), "the update is not finite")
    # ||R^T X^T||_F^2 = sum of the elementwise product of the two n x n Gram matrices: no (d_model, k) temporary.
    wide = residual.double()
    norm = float(((wide @ wide.T) * (solution.double().T @ solution.double())).sum().clamp(min=0).sqrt())
    largest = torch.finfo(trial.weights.current(layer).dtype).max
    if norm > 0.5 * largest:
        raise RejectedUpdate(layer, rows.tolist(), f"the update's norm {norm:.3g} overflows the weight's dtype")
    trial.add(layer, index, residual, solution)
    return norm


def add_columns(trial: Trial, layer: int, index: Tensor, delta: Tensor, rows: Tensor) -> float:
    """W[:, index[r]] += delta[r] inside `trial`; returns the Frobenius norm of the update.

    index: (n,) int64, repeats add up; delta: (n, d_model); rows: (n,) position in the batch of the edit of each
    Raises RejectedUpdate, with nothing written, when delta holds NaN or Inf, or the weight would."""
    chosen, place = torch.unique(index, return_inverse=True)
    # Summed before they are written: the weight is rounded once.
    solution = torch.zeros(len(chosen), len(index), dtype=delta.dtype, device=delta.device)
    solution[place, torch.arange(len(index), device=place.device)] = 1
    broken = ~torch.isfinite(delta).all(1)
    if bool(broken.any()):
        raise RejectedUpdate(layer, sorted(set(rows[broken].tolist())), "the update is not finite")
    return apply_update(trial, layer, chosen, delta, solution, rows)
