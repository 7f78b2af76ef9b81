"""Which settings fit a model: derived ones, and what they do at other depths or rates, on a few facts each.

For the closed forms this is a layer-sensitivity sweep: the value layer moves through the lower two thirds of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastedit.config import EditConfig, as_changes, layers_in_short, merged, setting_of
from fastedit.editing.calibration import Calibration, calibrate
from fastedit.editing.stream import Stream
from fastedit.methods.base import AnyMethod
from fastedit.methods.closed_form.second_moments import second_moments
from fastedit.methods.presets import derived_settings, described
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.runtime.progress import Show, tell
from fastedit.runtime.words import counted

# What another candidate must have more than the derived settings to be preferred: eight facts tell no less.
MARGIN = 0.05


@dataclass(frozen=True)
class Candidate:
    """One set of settings that was tried.

    name: what distinguishes it, such as "layers 4-8"
    found: what became of the facts; None where the method cannot be checked
    """

    name: str
    config: EditConfig
    found: Calibration | None

    @property
    def score(self) -> float:
        """Harmonic mean of efficacy, generalization and locality, over the perplexity where it rose; 0 for one that
        failed or was not checked."""
        found = self.found
        if found is None or found.failed or found.unchecked is not None or found.perplexity is None:
            return 0.0

        shares = (found.efficacy, found.generalization, found.locality)
        mean = 0.0 if min(shares) == 0 else len(shares) / sum(1 / share for share in shares)
        return mean / max(1.0, found.perplexity)

    def __str__(self) -> str:
        return f"{self.name}: {'not checked' if self.found is None else self.found}"


@dataclass(frozen=True)
class Suggestion:
    """Settings for a model, and what was tried.

    candidates: the derived settings first, then the others
    best: the derived ones, unless another candidate is clearly better
    """

    method: str
    model: Mapping[str, int | float | str | None]
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The derived settings, unless another candidate has a score that is higher by more than MARGIN."""
        derived = self.candidates[0]
        other = max(self.candidates, key=lambda candidate: candidate.score)
        return other if other.score > derived.score + MARGIN else derived

    def yaml(self) -> str:
        """A preset file with the best settings; `--preset` and `preset=` take it."""
        best = self.best
        origin = f"suggested by fastedit for {self.method}; {best}"
        config = best.config.model_dump(mode="json", exclude_defaults=True)
        model = {name: value for name, value in self.model.items() if value is not None}

        data = {"origin": origin, "model": model, "config": config}
        return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120))

    def plot(self, path: Path) -> None:
        """Draw the candidates that were checked as a PNG. Raises ValueError where matplotlib is not installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ValueError("a plot needs matplotlib: pip install 'fastedit-engine[plot]'") from error

        shown = sorted((c for c in self.candidates if c.found is not None and c.found.facts), key=_place)
        names = [candidate.name for candidate in shown]
        found = [candidate.found for candidate in shown if candidate.found is not None]

        figure = Figure(figsize=(2 + 1.1 * max(3, len(shown)), 4), layout="constrained")
        axes = figure.add_subplot()
        for name in ("efficacy", "generalization", "locality"):
            axes.plot(names, [getattr(one, name) for one in found], marker="o", label=name)
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel("share of the facts")
        axes.tick_params(axis="x", rotation=30)

        beside = axes.twinx()
        perplexities = [one.perplexity or float("nan") for one in found]
        beside.plot(names, perplexities, color="grey", linestyle="--", marker="x", label="perplexity")
        beside.set_ylabel("perplexity, times the unedited")

        lines = [*axes.get_lines(), *beside.get_lines()]
        axes.legend(lines, [str(line.get_label()) for line in lines], loc="lower right", fontsize=8)
        axes.set_title(f"{self.method}, {counted(len(found[0].facts) if found else 0, 'fact')} each", fontsize=9)
        figure.savefig(path, format="png", dpi=120)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        rows = [
            {
                "name": candidate.name,
                "score": candidate.score,
                "config": candidate.config.model_dump(mode="json", exclude_defaults=True),
                "calibration": None if candidate.found is None else candidate.found.to_dict(),
            }
            for candidate in self.candidates
        ]
        return {"method": self.method, "model": dict(self.model), "candidates": rows, "best": self.best.name}

    def __str__(self) -> str:
        return "\n".join([*map(str, self.candidates), f"suggested: {self.best.name}"])


def suggest(
    model: ModelAdapter,
    method: AnyMethod,
    changes: Mapping[str, Any] | None = None,
    text: Source | None = None,
    seed: int = 0,
    progress: Show = None,
) -> Suggestion:
    """Try derived settings of a method on a model, and what its sweep puts beside them. The model stays as it is.

    changes: settings that every candidate shares; what the sweep varies is not varied where it is among them
    text: for second moments; default: the model's own
    Raises CannotDerive for a method that derives no settings, or a model for which it cannot."""
    changes = dict(changes or {})
    first = derived_settings(method, model, changes)
    configs = {_name(method, first): first}
    for varied in _varied(method, model, first, changes):
        config = derived_settings(method, model, merged(changes, varied))
        configs.setdefault(_name(method, config), config)

    source = text or Source(seed=seed)
    if method.uses_second_moments:
        _read_text(model, method, list(configs.values()), source, progress)

    candidates = []
    for name, config in configs.items():
        stream = Stream(model, method, config, source, seed, 0, progress)
        found = calibrate(stream, again=True) if method.is_checked else None
        candidates.append(Candidate(name, config, found))
        tell(progress, f"{method.name}, {candidates[-1]}")

    return Suggestion(method.name, described(model), tuple(candidates))


def _varied(
    method: AnyMethod, model: ModelAdapter, first: EditConfig, changes: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """What the method's sweep puts beside the derived settings, as changes; nothing where the caller sets it."""
    if method.sweep is None or setting_of(changes, method.sweep.setting) is not None:
        return

    for value in method.sweep.values(model, first):
        yield as_changes(method.sweep.setting, value)


def _name(method: AnyMethod, config: EditConfig) -> str:
    """The setting that distinguishes a candidate, with its value."""
    if method.sweep is None:
        return "derived"

    value = setting_of(config.model_dump(), method.sweep.setting)
    return f"{method.sweep.setting} {layers_in_short(value) if isinstance(value, tuple) else value}"


def _read_text(
    model: ModelAdapter, method: AnyMethod, configs: Sequence[EditConfig], source: Source, progress: Show
) -> None:
    """Compute the second moments of all candidates in one pass; each finds its own in the cache."""
    windows = method.text_config(configs[0])
    assert windows is not None
    layers = sorted({layer for config in configs for layer in method.layers(model, config)})
    second_moments(model, layers, source, windows, show=progress)


def _place(candidate: Candidate) -> tuple[float, ...]:
    """Orders candidates by the numbers in their names."""
    return tuple(float(number) for number in re.findall(r"[0-9.]+(?:e-?[0-9]+)?", candidate.name))
