"""What closed-form recipes share: the state of a run, a batch with what is done to it, the write of one sweep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastedit.adapter import ModelAdapter
from fastedit.apply import apply_update
from fastedit.capture import KeySweep
from fastedit.config import MEMITConfig, NSEConfig
from fastedit.edits import Edit
from fastedit.journal import Trial
from fastedit.solver import PastKeys, RidgeSolver, Solver
from fastedit.target import Values, optimise_values


@dataclass
class EditState:
    """What lives as long as an editor: context templates, what runs the layers above the value layer, and per layer the
    second moment, the solver and past keys."""

    templates: tuple[str, ...]
    upper: ModelAdapter
    moments: dict[int, Tensor]
    solvers: dict[int, Solver]
    past: dict[int, PastKeys]


@dataclass
class BatchResult:
    """What a recipe did to one batch inside its trial.

    keys: layer -> (n_edits, d_ff) post-edit keys of all edits, which become history on commit; empty = no memory
    written: edits written per round; neurons: layer -> neurons written last; norms: layer -> summed update norms
    """

    values: Values
    keys: dict[int, Tensor] = field(default_factory=dict)
    written: list[int] = field(default_factory=list)
    neurons: dict[int, int] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """One batch of edits on its way into the model. progress: called with the number of values finished since."""

    model: ModelAdapter
    edits: Sequence[Edit]
    config: Any
    state: EditState
    trial: Trial
    progress: Callable[[int], None] | None = None

    def values(self) -> Values:
        """Values at the last edited layer, on the original or the present weights as the config says."""
        config, state = self.config, self.state
        with self.trial.weights.rewound() if config.rewind_values else contextlib.nullcontext():
            return optimise_values(
                self.model, self.edits, state.templates, config.layers[-1], config.value, self.progress, state.upper
            )

    def sweep(self) -> KeySweep:
        """A sweep over the edited layers. Use inside `model.packed()`."""
        return KeySweep(self.model, self.edits, self.state.templates, self.config.layers)


@dataclass(frozen=True)
class Recipe:
    """A method: how it writes a batch, and the solver it makes of a layer's second moment (d_ff, d_ff).

    write raises RejectedUpdate or NotPositiveDefinite; the batch's trial then rolls back."""

    write: Callable[[Batch], BatchResult]
    solver: Callable[[Tensor, Any], Solver]


def write_sweep(
    batch: Batch,
    sweep: KeySweep,
    result: BatchResult,
    choose_edits: Callable[[Tensor], Tensor] | None = None,
    choose_neurons: Callable[[Tensor], Tensor | None] | None = None,
) -> bool:
    """One pass from the first edited layer to the last, the residual spread over the layers still to come.

    choose_edits: residuals (n_edits, d_model) at the first layer -> (n_edits,) bool, the edits written; None = all
    choose_neurons: mass (d_ff,) -> (k,) int64 ascending, the neurons written, or None for every neuron
    Returns False, with nothing written, when a later round has no edit left to write."""
    active = torch.ones(len(batch.edits), dtype=torch.bool)
    for position, captured in enumerate(sweep):
        residual = result.values.values.to(captured.hidden.device) - captured.hidden
        if position == 0:
            active = active.to(residual.device) if choose_edits is None else choose_edits(residual)
            if result.written and not bool(active.any()):
                return False
            result.written.append(int(active.sum()))
        layer = captured.layer
        # In the last round that writes, weights below this layer are final: these are the post-edit keys.
        result.keys[layer], mass = sweep.keys(captured, active)
        if not bool(active.any()):
            continue
        chosen = None if choose_neurons is None else choose_neurons(mass)
        solution = batch.state.solvers[layer].solve(result.keys[layer][active], batch.state.past[layer], chosen)
        share = residual[active] / (len(sweep.layers) - position)
        norm = apply_update(batch.trial, layer, chosen, share, solution, active.nonzero().flatten())
        result.neurons[layer] = batch.model.d_ff if chosen is None else len(chosen)
        result.norms[layer] = result.norms.get(layer, 0.0) + norm
    return True


def ridge(moment: Tensor, config: NSEConfig | MEMITConfig) -> RidgeSolver:
    """The ridge system over lambda C. moment: (d_ff, d_ff)"""
    return RidgeSolver(moment, config.covariance_weight)


def one_round(batch: Batch) -> BatchResult:
    """Values, then one sweep that writes every edit on every neuron."""
    result = BatchResult(batch.values())
    with batch.model.packed():
        write_sweep(batch, batch.sweep(), result)
    return result
