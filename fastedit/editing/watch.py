"""Watches a stream of edits: a curve of metrics on a fixed sample, update norms, and early warnings.

    watch = Watch(editor, edits[:50], every=2, text=prose)
    editor.edit(edits, batch_size=100, watch=watch)
    watch.points        the measurements, in order
The sample is measured before the first edit and then after every `every` batches. Perplexity and the distance of the
edited weights from the original ones show a breaking model long before the stream ends.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from fastedit.evaluation.metrics import METRICS, Measurement, Metric
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit, EditSet
from fastedit.runs.reports import BatchReport
from fastedit.weights.editable import EditableWeights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WatchPoint:
    """The model after `n_edits` edits of the stream.

    metrics: by name, on the fixed sample
    drift: layer -> ||W - W_0|| / ||W_0||
    norms: layer -> summed norms of the updates since the last point
    warnings: bounds that are exceeded
    """

    n_edits: int
    metrics: Mapping[str, Metric]
    drift: Mapping[int, float]
    norms: Mapping[int, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "n_edits": self.n_edits,
            "metrics": {name: {"value": m.value, "error": m.error} for name, m in self.metrics.items()},
            "drift": dict(self.drift),
            "norms": dict(self.norms),
            "warnings": list(self.warnings),
        }


class Watched(Protocol):
    """What a Watch measures; an `Editor` is one."""

    @property
    def adapter(self) -> ModelAdapter:
        """The model."""
        ...

    @property
    def weights(self) -> EditableWeights:
        """Its weights, now and before any edit."""
        ...

    @property
    def edits(self) -> EditSet:
        """All edits in force."""
        ...

    @property
    def seed(self) -> int:
        """Seed of sampled text."""
        ...


class Watch:
    """Measures `editor` along a stream; pass it to `Editor.edit`.

    sample: the records measured, usually the first of the stream, so that forgetting shows
    every: batches between two points; the last batch is always a point
    text: the perplexity of its first `text_tokens` tokens is measured; None = not measured
    max_perplexity: warn when perplexity exceeds this multiple of the unedited model's
    max_drift: warn when ||W - W_0|| / ||W_0|| of a layer exceeds it
    Raises ValueError for an empty sample or every < 1.
    """

    def __init__(
        self,
        editor: Watched,
        sample: Sequence[Edit],
        every: int = 1,
        text: str | None = None,
        text_tokens: int = 4000,
        max_perplexity: float = 1.2,
        max_drift: float = 0.5,
    ) -> None:
        if every < 1 or len(sample) == 0:
            raise ValueError(f"watch: wanted every >= 1 and records to ask about, got {every} and {len(sample)}")

        self.editor = editor
        self.sample = sample
        self.every = every
        self.text = text
        self.text_tokens = text_tokens
        self.max_perplexity = max_perplexity
        self.max_drift = max_drift

        self.points: list[WatchPoint] = []
        self._unedited: Measurement | None = None
        self._norms: dict[int, float] = {}
        self._n_edits = 0

    def begin(self) -> None:
        """Measure before the stream; the unedited model once, whatever was edited before."""
        if self._unedited is None:
            with self.editor.weights.rewound():
                self._unedited = self._measure()

        self._n_edits = len(self.editor.edits)
        self._add_point()

    def after_batch(self, report: BatchReport, last: bool) -> None:
        """Count a committed or rejected batch, and measure every `every` batches."""
        if report.error is None:
            self._n_edits += len(report.case_ids)
            for layer, norm in report.norms.items():
                self._norms[layer] = self._norms.get(layer, 0.0) + norm

        if last or (report.batch + 1) % self.every == 0:
            self._add_point()

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data for JSON."""
        return [point.to_dict() for point in self.points]

    def __str__(self) -> str:
        names = [name for name in METRICS if any(p.metrics[name].value is not None for p in self.points)]
        lines = ["  ".join(["edits", *(f"{name:>{max(len(name), 6)}}" for name in names), "drift"])]
        for point in self.points:
            cells = [_short(point.metrics[name].value).rjust(max(len(name), 6)) for name in names]
            lines.append("  ".join([f"{point.n_edits:>5}", *cells, f"{max(point.drift.values()):.3f}"]))
        return "\n".join(lines)

    def _measure(self) -> Measurement:
        options = (self.text, self.text_tokens, 0, self.editor.seed, False)
        return Measurement.take(self.editor.adapter, self.sample, *options)

    def _add_point(self) -> None:
        assert self._unedited is not None
        metrics = self._measure().metrics(self._unedited)
        weights = self.editor.weights
        drift = {layer: _distance(weights.current(layer), weights.original(layer)) for layer in weights.layers}

        warnings = self._warnings(metrics, drift)
        for warning in warnings:
            log.warning("after %d edits: %s", self._n_edits, warning)

        self.points.append(WatchPoint(self._n_edits, metrics, drift, self._norms, warnings))
        self._norms = {}

    def _warnings(self, metrics: Mapping[str, Metric], drift: Mapping[int, float]) -> tuple[str, ...]:
        # Comparisons are negated so that NaN exceeds every bound.
        messages = []
        now = metrics["perplexity"].value
        before = None if self._unedited is None else self._unedited.perplexity
        if now is not None and before is not None and not now <= self.max_perplexity * before:
            messages.append(
                f"perplexity {now:.1f} is {now / before:.2f} times the unedited model's (bound {self.max_perplexity:g})"
            )

        messages += [
            f"layer {layer} has moved by {share:.2f} of its norm (bound {self.max_drift:g})"
            for layer, share in drift.items()
            if not share <= self.max_drift
        ]
        return tuple(messages)


def _distance(now: Tensor, before: Tensor) -> float:
    """||W - W_0|| / ||W_0|| of (d_model, d_ff) weights, in float32."""
    return float((now.float() - before.float()).norm() / before.float().norm())


def _short(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"
