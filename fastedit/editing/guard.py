"""Bounds on what a batch may do to the model, checked before the batch is committed, on the weights it wrote."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from fastedit.evaluation.answers import agreement, answer, perplexity
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit
from fastedit.weights.editable import EditableWeights

log = logging.getLogger(__name__)


class GuardTripped(ValueError):
    """A batch exceeded a bound. The message says which, with the measurement."""


class Guard:
    """Bounds on what edits may do to the model, all relative to the unedited one.

    max_growth: largest ||W|| / ||W_0|| of an edited layer
    canaries: records whose locality prompts are asked before every commit; at least the share `min_unchanged` of the
        arg-max tokens of their answers must equal the unedited model's
    text: the perplexity of its first `text_tokens` tokens must stay below `max_perplexity` times the unedited model's
    only_warn: commit a batch that exceeds a bound all the same, with a warning
    Raises ValueError for canaries without locality prompts, or a bound out of its range.
    """

    def __init__(
        self,
        max_growth: float = 10.0,
        canaries: Sequence[Edit] = (),
        min_unchanged: float = 0.5,
        text: str | None = None,
        text_tokens: int = 1000,
        max_perplexity: float = 1.5,
        only_warn: bool = False,
    ) -> None:
        wrong = [
            *([] if max_growth > 1 else [f"wanted max_growth > 1, got {max_growth}"]),
            *([] if max_perplexity > 1 else [f"wanted max_perplexity > 1, got {max_perplexity}"]),
            *([] if 0 <= min_unchanged <= 1 else [f"wanted min_unchanged in [0, 1], got {min_unchanged}"]),
        ]
        if wrong:
            raise ValueError(f"guard: {'; '.join(wrong)}")

        probes = [probe for edit in canaries for probe in edit.locality]
        self.questions = [(probe.prompt, probe.answer) for probe in probes if probe.answer is not None]
        if canaries and not self.questions:
            raise ValueError(f"guard: none of the {len(canaries)} canaries has a locality prompt with an answer")

        self.max_growth = max_growth
        self.min_unchanged = min_unchanged
        self.max_perplexity = max_perplexity
        self.text = text
        self.text_tokens = text_tokens
        self.only_warn = only_warn

        # Of the unedited model: arg-max tokens of the answers, perplexity, norms of the layers.
        self._best: list[tuple[int, ...]] = []
        self._perplexity = 1.0
        self._norms: dict[int, float] = {}

    def begin(self, model: ModelAdapter, weights: EditableWeights) -> None:
        """Measure the unedited model, whatever was edited before."""
        self._norms = {layer: float(weights.original(layer).float().norm()) or 1.0 for layer in weights.layers}

        with weights.rewound():
            self._best = [scored.best for scored in answer(model, self.questions)] if self.questions else []
            if self.text is not None:
                self._perplexity = self._perplexity_of(model)

    def check(self, model: ModelAdapter, weights: EditableWeights, layers: Iterable[int]) -> dict[str, float]:
        """Measure the current model: growth of `layers`, and unchanged and perplexity where they are guarded.

        Raises GuardTripped when a bound is exceeded or a number is NaN."""
        measured: dict[str, float] = {}
        exceeded = [
            *self._check_growth(weights, layers, measured),
            *self._check_canaries(model, measured),
            *self._check_perplexity(model, measured),
        ]
        if exceeded and not self.only_warn:
            raise GuardTripped("; ".join(exceeded))

        for message in exceeded:
            log.warning("guard: %s", message)
        return measured

    # Each check adds its measurement and returns messages. Comparisons are negated so that NaN exceeds every bound.

    def _check_growth(self, weights: EditableWeights, layers: Iterable[int], measured: dict[str, float]) -> list[str]:
        growth = {layer: float(weights.current(layer).float().norm()) / self._norms[layer] for layer in layers}
        measured["growth"] = max(growth.values(), default=1.0)
        return [
            f"layer {layer} has {share:.3g} times its norm (max_growth {self.max_growth:g})"
            for layer, share in growth.items()
            if not share <= self.max_growth
        ]

    def _check_canaries(self, model: ModelAdapter, measured: dict[str, float]) -> list[str]:
        if not self.questions:
            return []

        answers = answer(model, self.questions)
        agreements = [agreement(scored.best, before) for scored, before in zip(answers, self._best, strict=True)]
        unchanged = measured["unchanged"] = sum(agreements) / len(agreements)
        if not unchanged >= self.min_unchanged:
            return [f"{unchanged:.2f} of the canaries' tokens stayed (bound {self.min_unchanged})"]
        return []

    def _check_perplexity(self, model: ModelAdapter, measured: dict[str, float]) -> list[str]:
        if self.text is None:
            return []

        ratio = measured["perplexity"] = self._perplexity_of(model) / self._perplexity
        if not ratio <= self.max_perplexity:
            return [f"perplexity is {ratio:.3g} times the unedited model's (bound {self.max_perplexity:g})"]
        return []

    def _perplexity_of(self, model: ModelAdapter) -> float:
        try:
            return perplexity(model, self.text or "", self.text_tokens, show=False)
        except OverflowError:
            return float("inf")

    def __repr__(self) -> str:
        bounds = [f"max_growth {self.max_growth:g}"]
        if self.questions:
            bounds.append(f"min_unchanged {self.min_unchanged:g} on {len(self.questions)} canary prompts")
        if self.text is not None:
            bounds.append(f"max_perplexity {self.max_perplexity:g}")
        if self.only_warn:
            bounds.append("only warns")
        return f"Guard({', '.join(bounds)})"
