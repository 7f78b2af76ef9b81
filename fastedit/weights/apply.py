"""Checks an update and adds it to a weight, inside a trial."""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.weights.trial import Trial


class RejectedUpdate(ValueError):
    """An update that must not be written, such as one that would leave NaN or Inf in a weight. The batch is rolled back
    and counts as rejected; a method of your own may raise it too.

    layer: the layer of the weight; rows: positions in the batch of the edits that the update came from"""

    def __init__(self, layer: int, rows: list[int], reason: str) -> None:
        super().__init__(f"layer {layer}: {reason}")
        self.layer = layer
        self.rows = rows


def apply_update(
    trial: Trial, layer: int, index: Tensor | None, residual: Tensor, solution: Tensor, rows: Tensor
) -> float:
    """W[:, S] += R^T X^T inside `trial`; returns the Frobenius norm of the update.

    index: S, (k,) int64, or None for all columns; residual: R, (n, d_model); solution: X, (k, n)
    rows: (n,) int64, the position in the batch of the edit behind each row of R, for the error
    Raises RejectedUpdate and writes nothing if R or X holds NaN or Inf, or if the weight would."""
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

    index: (n,) int64, in which a column may repeat: its deltas add up; delta: (n, d_model)
    rows: (n,) int64, the position in the batch of the edit behind each delta, for the error
    Raises RejectedUpdate and writes nothing if delta holds NaN or Inf, or if the weight would."""
    columns, place = torch.unique(index, return_inverse=True)

    # X is 0 or 1, so that deltas of one column are summed before the weight is rounded, once.
    solution = torch.zeros(len(columns), len(index), dtype=delta.dtype, device=delta.device)
    solution[place, torch.arange(len(index), device=place.device)] = 1

    broken = ~torch.isfinite(delta).all(1)
    if bool(broken.any()):
        raise RejectedUpdate(layer, sorted(set(rows[broken].tolist())), "the update is not finite")

    return apply_update(trial, layer, columns, delta, solution, rows)
