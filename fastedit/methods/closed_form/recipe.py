"""What the closed-form methods share: state, batch and result, the method object, the write of one sweep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fastedit.config import layers_in_short
from fastedit.methods.base import Method, Progress, Start
from fastedit.methods.closed_form.config import ClosedFormConfig
from fastedit.methods.closed_form.keys import KeySweep, LayerCapture
from fastedit.methods.closed_form.second_moments import second_moments
from fastedit.methods.closed_form.selection import MassRule
from fastedit.methods.closed_form.solver import PastKeys, RidgeSolver, Solver
from fastedit.methods.closed_form.templates import sample_templates
from fastedit.methods.closed_form.values import Values, optimise_values, upper_layers
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.ops.select_neurons import select_neurons
from fastedit.records.edit import Edit
from fastedit.runtime.hashing import tensors_hash
from fastedit.runtime.progress import track
from fastedit.weights.apply import apply_update
from fastedit.weights.trial import Trial

F = TypeVar("F", bound=ClosedFormConfig)


@dataclass
class ClosedFormState:
    """The state of an editor with a closed-form method.

    templates: context templates
    upper: runs the layers above the value layer; the model itself, or a copy of these layers in another dtype
    moments: layer -> second moment C (d_ff, d_ff)
    solvers, past: by layer; `past` holds the keys of committed edits
    """

    templates: tuple[str, ...]
    upper: ModelAdapter
    moments: dict[int, Tensor]
    solvers: dict[int, Solver]
    past: dict[int, PastKeys]

    def kept(self, result: BatchResult) -> dict[str, Tensor]:
        """The keys of a batch, which join the history: layer -> (n_edits, d_ff) float32."""
        return {str(layer): keys.float() for layer, keys in result.keys.items()}

    def take_in(self, kept: Mapping[str, Tensor]) -> None:
        """Add the keys of a committed batch to the history."""
        for layer, keys in kept.items():
            past = self.past[int(layer)]
            past.add(keys.to(past.device))

    def tensors(self) -> dict[str, Tensor]:
        """Past keys, as rows or as their sum."""
        return {
            f"{layer}/{name}": tensor for layer, past in self.past.items() for name, tensor in past.tensors().items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Return to the past keys that `tensors` returned."""
        for layer, past in self.past.items():
            prefix = f"{layer}/"
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            past.load(own)

    def describe(self) -> dict[str, Any]:
        """The templates, and the SHA-256 of each second moment."""
        hashes = {str(layer): tensors_hash({"moment": moment}) for layer, moment in self.moments.items()}
        return {"templates": list(self.templates), "moments": hashes}

    def adopt(self, described: Mapping[str, Any]) -> None:
        """Take over the templates. Raises ValueError for other second moments."""
        now = self.describe()["moments"]
        differ = [layer for layer, digest in described["moments"].items() if now.get(layer) != digest]
        if differ:
            raise ValueError(f"second moments of layers {', '.join(differ)} are not those that the run began with")

        self.templates = tuple(described["templates"])


@dataclass
class BatchResult:
    """What a recipe did to one batch inside its trial.

    keys: layer -> (n_edits, d_ff), post-edit keys of all edits, which join the history on commit; empty = no memory
    written: number of edits written per round
    neurons: layer -> number of neurons written last
    norms: layer -> summed Frobenius norms of the updates
    active: per round, the edits written, (n_edits,) bool
    """

    values: Values
    keys: dict[int, Tensor] = field(default_factory=dict)
    written: list[int] = field(default_factory=list)
    neurons: dict[int, int] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    active: list[Tensor] = field(default_factory=list)

    @property
    def is_written(self) -> Tensor:
        """(n_edits,) bool on the CPU: whether an update was written for the edit in some round."""
        return torch.stack(self.active).any(0).cpu()

    def tensors(self) -> dict[str, Tensor]:
        """The values, by name: a later write can start from them."""
        return self.values.tensors()

    @property
    def losses(self) -> Tensor:
        """(n_edits,) loss at the last forward."""
        return self.values.losses

    @property
    def steps(self) -> Tensor:
        """(n_edits,) int64, Adam steps."""
        return self.values.steps


@dataclass(frozen=True)
class Batch(Generic[F]):
    """One batch of edits on its way into the model.

    progress: called with the number of values finished since the last call; with 0 where the batch may be abandoned
    known: values of the edits that were optimised before
    """

    model: ModelAdapter
    edits: Sequence[Edit]
    config: F
    state: ClosedFormState
    trial: Trial
    progress: Progress | None = None
    known: Values | None = None

    def values(self) -> Values:
        """Values at the last edited layer, on the original or the current weights as the config says."""
        if self.known is not None:
            return self.known

        config, state = self.config, self.state
        with self.trial.weights.rewound() if config.rewind_values else contextlib.nullcontext():
            return optimise_values(
                self.model, self.edits, state.templates, config.layers[-1], config.value, self.progress, state.upper
            )

    def sweep(self) -> KeySweep:
        """A sweep over the edited layers. Use inside `model.packed()`."""
        return KeySweep(self.model, self.edits, self.state.templates, self.config.layers)


@dataclass(frozen=True, kw_only=True)
class ClosedFormMethod(Method[F, ClosedFormState]):
    """A method that solves one linear system per layer.

    recipe: writes a batch; raises RejectedUpdate or NotPositiveDefinite, and the batch's trial is then rolled back
    solver: makes a layer's solver from its second moment (d_ff, d_ff)
    """

    recipe: Callable[[Batch[F]], BatchResult]
    solver: Callable[[Tensor, F], Solver]
    token_budget_setting: str | None = "value.token_budget"
    text_setting: str | None = "moments"
    uses_second_moments: bool = True

    def layers(self, model: ModelAdapter, config: F) -> tuple[int, ...]:
        """The edited layers. Raises ValueError for layers that cannot be written towards one value."""
        if config.layers[-1] >= model.n_layers - 1:
            raise ValueError(
                f"layers must lie below the last layer {model.n_layers - 1}, got {layers_in_short(config.layers)}"
            )

        model.check_layers(config.layers)
        return config.layers

    def template_tokens(self, config: F) -> int:
        """Tokens before a prompt: a template has at most its configured length, and its full stop."""
        return config.templates.length + 1

    def prepare(self, start: Start[F]) -> ClosedFormState:
        """Sample templates, load or compute second moments, make the solvers.

        Raises ValueError for layers without a second moment."""
        model, config = start.model, start.config

        with start.weights.rewound():
            templates = sample_templates(model, config.templates, start.seed)
            moments = self._second_moments(start)

        solvers: dict[int, Solver] = {}
        with track(len(moments), "preparing the solvers", "layers", start.progress) as advance:
            for layer, moment in moments.items():
                solvers[layer] = self.solver(moment, config)
                advance(1)

        past = {layer: PastKeys(model.d_ff, model.device) for layer in config.layers}
        upper = upper_layers(model, config.layers[-1], config.value)
        return ClosedFormState(templates, upper, moments, solvers, past)

    def write_batch(
        self,
        start: Start[F],
        state: ClosedFormState,
        edits: Sequence[Edit],
        trial: Trial,
        progress: Progress | None = None,
        known: Mapping[str, Tensor] | None = None,
    ) -> BatchResult:
        """Write one batch inside its trial. known: its values, where they were optimised before."""
        values = None if known is None else Values.from_tensors(known)
        return self.recipe(Batch(start.model, edits, start.config, state, trial, progress, values))

    def _second_moments(self, start: Start[F]) -> dict[int, Tensor]:
        """layer -> C (d_ff, d_ff), on the device where systems are solved."""
        model, config, moments = start.model, start.config, start.moments
        if moments is None or isinstance(moments, Source):
            moments = second_moments(model, config.layers, start.text, config.moments, show=start.progress)

        missing = [layer for layer in config.layers if layer not in moments]
        if missing:
            raise ValueError(f"moments: layers {missing} are missing, got {sorted(moments)}")
        return {layer: moments[layer].to(model.device) for layer in config.layers}


def write_sweep(
    batch: Batch[F],
    sweep: KeySweep,
    result: BatchResult,
    choose_edits: Callable[[Tensor], Tensor] | None = None,
    rule: MassRule | None = None,
) -> bool:
    """One pass from the first edited layer to the last; each writes its share of the residual z - h.

    choose_edits: residuals (n_edits, d_model) at the first layer -> (n_edits,) bool, the edits written; None = all
    rule: selects the neurons written by their mass; None = every neuron
    Returns False, with nothing written, when no edit is left to write in a later round."""
    active = torch.ones(len(batch.edits), dtype=torch.bool)
    rows = torch.arange(len(batch.edits))

    for position, captured in enumerate(sweep):
        layer = captured.layer
        residual = result.values.z.to(captured.hidden.device) - captured.hidden

        if position == 0:
            active = active.to(residual.device) if choose_edits is None else choose_edits(residual)
            # The only wait for the device before the solve of a layer.
            rows = active.nonzero().flatten()
            if result.written and not len(rows):
                return False
            result.written.append(len(rows))
            result.active.append(active)

        if batch.progress is not None:
            # A batch may be abandoned here.
            batch.progress(0)

        # In the last round that writes, the weights below this layer are final, so these are the post-edit keys.
        if not len(rows):
            result.keys[layer] = sweep.keys(captured, active).keys
            continue
        result.keys[layer], chosen, solution = _solve(batch, sweep, captured, active, rows, rule)

        share = residual[rows] / (len(sweep.layers) - position) / batch.model.value_gain
        norm = apply_update(batch.trial, layer, chosen, share, solution, rows)
        result.neurons[layer] = batch.model.d_ff if chosen is None else len(chosen)
        result.norms[layer] = result.norms.get(layer, 0.0) + norm

    return True


def one_round(batch: Batch[F]) -> BatchResult:
    """Values, then one sweep that writes every edit on every neuron."""
    result = BatchResult(batch.values())
    with batch.model.packed():
        write_sweep(batch, batch.sweep(), result)
    return result


class _Weighted(Protocol):
    """Settings with the weight lambda of the second moment."""

    @property
    def covariance_weight(self) -> float: ...


def ridge(moment: Tensor, config: _Weighted) -> RidgeSolver:
    """The ridge system over lambda C. moment: (d_ff, d_ff)"""
    return RidgeSolver(moment, config.covariance_weight)


def _solve(
    batch: Batch[F],
    sweep: KeySweep,
    captured: LayerCapture,
    active: Tensor,
    rows: Tensor,
    rule: MassRule | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Keys of all edits (n_edits, d_ff), the selected neurons (k,) or None for all, X (k, number of rows)."""
    solver, past = batch.state.solvers[captured.layer], batch.state.past[captured.layer]
    if rule is None:
        keys = sweep.keys(captured, active).keys
        return keys, None, solver.solve(keys[rows], past)

    if isinstance(solver, RidgeSolver):
        # Its system is the one that the fused chain builds on the device.
        chain = sweep.chain(captured, active, solver, past, rule)
        chosen, system = chain.read()
        return chain.keys, chosen, solver.solve_system(system, chain.keys[rows][:, chosen])

    keys, mass = sweep.keys(captured, active)
    chosen = select_neurons(mass, reaching=rule.reaching, within=rule.within)
    return keys, chosen, solver.solve(keys[rows], past, chosen)
