"""What every recipe gets and gives: the state of a run, the result of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastedit.adapter import ModelAdapter
from fastedit.edits import Edit
from fastedit.journal import Trial
from fastedit.solver import PastKeys, RidgeSolver
from fastedit.target import Values, optimise_values


@dataclass
class EditState:
    """What lives as long as an editor: context templates, and per layer the solver and the past keys."""

    templates: tuple[str, ...]
    solvers: dict[int, RidgeSolver]
    past: dict[int, PastKeys]


@dataclass
class BatchResult:
    """What a recipe did to one batch inside its trial.

    keys: layer -> (n_edits, d_ff) post-edit keys of all edits, which become history on commit
    written: edits written per round; neurons: layer -> neurons written last; norms: layer -> summed update norms
    """

    values: Values
    keys: dict[int, Tensor] = field(default_factory=dict)
    written: list[int] = field(default_factory=list)
    neurons: dict[int, int] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)


Recipe = Callable[[ModelAdapter, Sequence[Edit], Any, EditState, Trial, Callable[[int], None] | None], BatchResult]


def wanted_values(
    model: ModelAdapter,
    edits: Sequence[Edit],
    config: Any,
    state: EditState,
    trial: Trial,
    progress: Callable[[int], None] | None,
) -> Values:
    """Values at the last edited layer, on the original or the present weights as the config says."""
    layer = config.layers[-1]
    if not config.rewind_values:
        return optimise_values(model, edits, state.templates, layer, config.value, progress)
    with trial.weights.rewound():
        return optimise_values(model, edits, state.templates, layer, config.value, progress)
