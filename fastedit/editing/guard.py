"""What a batch must not do to the model: judged before it is committed, on the weights that it wrote."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fastedit.evaluation.answers import agreement, answer, perplexity
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit

if TYPE_CHECKING:
    from fastedit.weights.editable import EditableWeights

log = logging.getLogger(__name__)


class GuardTripped(ValueError):
    """A batch went past a bound. The message says which, with what was measured."""


class Guard:
    """Bounds on what edits may do to the model, all against the unedited one.

    max_growth: largest ||W|| / ||W_0|| of an edited layer
    canaries: records whose locality prompts are asked about before every commit; at least the share `min_unchanged` of
        the arg-max tokens of their answers must be the unedited model's
    text: its first `text_tokens` tokens must not become `max_perplexity` times as perplexing
    only_warn: a batch past a bound is committed all the same, with a warning
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
        if not (max_growth > 1 and max_perplexity > 1 and 0 <= min_unchanged <= 1):
            raise ValueError(
                f"guard: wanted max_growth > 1, max_perplexity > 1 and min_unchanged in [0, 1],"
                f" got {max_growth}, {max_perplexity} and {min_unchanged}"
            )
        probes = [probe for edit in canaries for probe in edit.locality]
        self.questions = [(probe.prompt, probe.answer) for probe in probes if probe.answer is not None]
        if canaries and not self.questions:
            raise ValueError(f"guard: none of the {len(canaries)} canaries has a locality prompt with an answer")
        self.max_growth, self.min_unchanged, self.max_perplexity = max_growth, min_unchanged, max_perplexity
        self.text, self.text_tokens, self.only_warn = text, text_tokens, only_warn
        self._best: list[tuple[int, ...]] = []
        self._unedited = 1.0
        self._norms: dict[int, float] = {}

    def begin(self, model: ModelAdapter, weights: EditableWeights) -> None:
        """Ask the unedited model, whatever was edited before."""
        self._norms = {layer: float(weights.original(layer).float().norm()) or 1.0 for layer in weights.layers}
        with weights.rewound():
            self._best = [found.best for found in answer(model, self.questions)] if self.questions else []
            if self.text is not None:
                self._unedited = self._perplexity_of(model)

    def check(self, model: ModelAdapter, weights: EditableWeights, layers: Iterable[int]) -> dict[str, float]:
        """Measure the model as it is: growth of `layers`, and unchanged and perplexity where they are guarded.

        Raises GuardTripped when a bound is passed or a number is NaN."""
        growth = {layer: float(weights.current(layer).float().norm()) / self._norms[layer] for layer in layers}
        measured = {"growth": max(growth.values(), default=1.0)}
        tripped = [
            f"layer {layer} has {share:.3g} times its norm (max_growth {self.max_growth:g})"
            for layer, share in growth.items()
            if not share <= self.max_growth
        ]
        if self.questions:
            found = answer(model, self.questions)
            kept = [agreement(now.best, before) for now, before in zip(found, self._best, strict=True)]
            measured["unchanged"] = sum(kept) / len(kept)
            if not measured["unchanged"] >= self.min_unchanged:
                tripped.append(
                    f"{measured['unchanged']:.2f} of the canaries' tokens stayed (bound {self.min_unchanged})"
                )
        if self.text is not None:
            measured["perplexity"] = self._perplexity_of(model) / self._unedited
            if not measured["perplexity"] <= self.max_perplexity:
                tripped.append(
                    f"perplexity is {measured['perplexity']:.3g} times the unedited model's"
                    f" (bound {self.max_perplexity:g})"
                )
        if tripped and not self.only_warn:
            raise GuardTripped("; ".join(tripped))
        for each in tripped:
            log.warning("guard: %s", each)
        return measured

    def _perplexity_of(self, model: ModelAdapter) -> float:
        try:
            return perplexity(model, self.text or "", self.text_tokens, show=False)
        except OverflowError:
            return float("inf")
