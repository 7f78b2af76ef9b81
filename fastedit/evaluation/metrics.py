"""The field's metrics, batched over records, unedited beside edited, each with its standard error over records.

The field scores answers in three ways whose numbers cannot be compared. The name says which:

efficacy, generalization, specificity: is the right answer the more probable one? Mean token log-probabilities of
    target_new and target_true are compared (a neighbour's own answer for specificity), strictly. The ES, PS and NS of
    ROME, MEMIT and AlphaEdit on CounterFact
*_top1: every token of the right answer is the arg-max under teacher forcing
*_tokens: share of its tokens that are: efficacy_tokens and generalization_tokens are EasyEdit's rewrite_acc and
    rephrase_acc and, with specificity_tokens, what MEMIT and AlphaEdit report on zsRE

Further:

score: harmonic mean of efficacy, generalization and specificity
tokens_unchanged: share of locality answers whose arg-max tokens all equal the unedited model's
locality_tokens: share of their single tokens that do, EasyEdit's locality
over_editing, unchanging: of the questions about another relation of the edited subject (KnowEdit's group
    Relation_Specificity), the share answered with the new target, every token the arg-max, and the share whose answer
    equals the unedited model's. FiNE names the two rates and does not define them; this is our reading
portability, portability_tokens: of questions whose answers follow from an edit, exact and by tokens; the second is
    EasyEdit's
fluency: 100 * (H2 / 3 + 2 * H3 / 3), H_n the n-gram entropy in bits of texts continued from the generation prompts, or
    from the prompts of records that have none (ROME)
perplexity: of a text, windows of 512 tokens

Where several answers are right, the one that scores best counts; whether an answer changed is judged by the first.
Locality and portability are also measured for each group of questions ("portability/Reasoning"), and a record's value
is the mean over its groups. A metric whose fields the records lack is None ("n/a").
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from fastedit.evaluation.answers import Answer, agreement, answer, perplexity
from fastedit.model.adapter import ModelAdapter
from fastedit.model.sampling import sample_tokens
from fastedit.model.tokens import encode
from fastedit.records.edit import Edit, Probe
from fastedit.runtime.progress import Show, track

METRICS = (
    "efficacy",
    "efficacy_top1",
    "generalization",
    "generalization_top1",
    "specificity",
    "specificity_top1",
    "score",
    "tokens_unchanged",
    "fluency",
    "perplexity",
)

# The locality group that asks for other relations of the edited subject, as KnowEdit names it.
OTHER_RELATION = "Relation_Specificity"

# Shown only where some record asks about it.
PORTABILITY = "portability"


@dataclass(frozen=True)
class Metric:
    """One number with its standard error over records; both None where it cannot be measured."""

    value: float | None
    error: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, of the unedited and of the edited model, on n_records records."""

    n_records: int
    unedited: dict[str, Metric]
    edited: dict[str, Metric]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        both = {"unedited": self.unedited, "edited": self.edited}
        return {
            "n_records": self.n_records,
            **{
                side: {name: {"value": m.value, "error": m.error} for name, m in found.items()}
                for side, found in both.items()
            },
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """(metric, unedited, edited) as text."""
        names = list(METRICS)
        if self.edited[PORTABILITY].value is not None:
            names.insert(names.index("tokens_unchanged") + 1, PORTABILITY)
        return [(name, _text(self.unedited[name]), _text(self.edited[name])) for name in names]

    def __str__(self) -> str:
        lines = [f"{'metric':<21}{'unedited':>16}{'edited':>16}   ({self.n_records} records)"]
        lines += [f"{name:<21}{before:>16}{after:>16}" for name, before, after in self.rows()]
        return "\n".join(lines)


class Edited(Protocol):
    """A model whose edits can be taken away for a moment; an `Editor` is one."""

    @property
    def adapter(self) -> ModelAdapter:
        """The model."""
        ...

    @property
    def seed(self) -> int:
        """Seed of sampled text."""
        ...

    @property
    def progress(self) -> Show:
        """Whether progress bars are shown; None = on a terminal."""
        ...

    def unedited(self) -> AbstractContextManager[None]:
        """Inside the block the model has its original weights."""
        ...


def evaluate(
    editor: Edited,
    edits: Sequence[Edit],
    text: str | None = None,
    text_tokens: int = 20_000,
    fluency_prompts: int = 50,
    show: Show = None,
) -> Evaluation:
    """Measure the editor's model as it is and as it was before any edit.

    edits: the records to ask about, usually `run.edits` after the whole stream
    text: for perplexity, its first text_tokens tokens; None = n/a
    fluency_prompts: how many records' prompts are continued for fluency; 0 = n/a
    """
    show = editor.progress if show is None else show
    options = (text, text_tokens, fluency_prompts, editor.seed, show)
    with editor.unedited():
        before = Measurement.take(editor.adapter, edits, *options)

    after = Measurement.take(editor.adapter, edits, *options)
    return Evaluation(len(edits), before.metrics(before), after.metrics(before))


def compare(
    unedited: ModelAdapter,
    edited: ModelAdapter,
    edits: Sequence[Edit],
    text: str | None = None,
    text_tokens: int = 20_000,
    fluency_prompts: int = 50,
    seed: int = 0,
    show: Show = None,
) -> Evaluation:
    """Like `evaluate`, for two models, which may be the same one."""
    options = (text, text_tokens, fluency_prompts, seed, show)
    before = Measurement.take(unedited, edits, *options)
    after = before if edited is unedited else Measurement.take(edited, edits, *options)
    return Evaluation(len(edits), before.metrics(before), after.metrics(before))


@dataclass(frozen=True)
class Measurement:
    """One model's answers to the questions of `edits`, the texts it wrote, and its perplexity."""

    edits: Sequence[Edit]
    answers: dict[Asked, Answer]
    texts: list[str]
    perplexity: float | None

    @classmethod
    def take(
        cls,
        model: ModelAdapter,
        edits: Sequence[Edit],
        text: str | None,
        text_tokens: int,
        fluency_prompts: int,
        seed: int,
        show: Show,
    ) -> Measurement:
        """Measure a model; the arguments are those of `evaluate` and `compare`."""
        pairs = list(dict.fromkeys(pair for edit in edits for pair in _questions(edit)))
        with track(len(pairs), "scoring answers", "answers", show) as advance:
            answers = dict(zip(pairs, answer(model, pairs, advance), strict=True))

        prompts = [(*edit.generation_prompts, edit.prompt)[0] for edit in edits[:fluency_prompts]]
        texts = _continued(model, prompts, seed, show)
        measured = None if text is None else perplexity(model, text, text_tokens, show)
        return cls(edits, answers, texts, measured)

    def metrics(self, unedited: Measurement) -> dict[str, Metric]:
        """All metrics by name. unedited: the measurement that tokens are compared with."""

        def unchanged(edit: Edit, probe: Probe) -> float | None:
            """Share of the arg-max tokens under the probe's answer that are the unedited model's."""
            if probe.answer is None:
                return None
            asked = probe.prompt, probe.answer, edit.join
            return agreement(self.answers[asked].best, unedited.answers[asked].best)

        metrics = self._scored("", self._preferred)
        metrics |= self._scored("_top1", self._exact)
        metrics |= self._scored("_tokens", self._share)

        metrics |= self._grouped("tokens_unchanged", "locality", lambda e, p: _whole(unchanged(e, p)))
        metrics |= self._grouped("locality_tokens", "locality", lambda e, p: unchanged(e, p))
        metrics["over_editing"] = self._of_other_relations(lambda e, p: self._exact(e, p.prompt, (e.target_new,)))
        metrics["unchanging"] = self._of_other_relations(lambda e, p: _whole(unchanged(e, p)))
        metrics |= self._grouped("portability", "portability", lambda e, p: self._exact(e, p.prompt, p.answers))
        metrics |= self._grouped("portability_tokens", "portability", lambda e, p: self._share(e, p.prompt, p.answers))

        metrics["score"] = _harmonic_mean([metrics[name] for name in ("efficacy", "generalization", "specificity")])
        metrics["fluency"] = _mean([100 * fluency(text) for text in self.texts])
        metrics["perplexity"] = Metric(self.perplexity)
        return metrics

    def _scored(self, suffix: str, way: _Way) -> dict[str, Metric]:
        """Efficacy, generalization and specificity, scored in one way."""
        edits = self.edits
        learned = [[way(e, e.prompt, (e.target_new,), e.target_true)] for e in edits]
        reworded = [[way(e, p, (e.target_new,), e.target_true) for p in e.rephrase_prompts] for e in edits]
        return {
            f"efficacy{suffix}": _mean(_known_means(learned)),
            f"generalization{suffix}": _mean(_known_means(reworded)),
            **self._grouped(f"specificity{suffix}", "locality", lambda e, p: way(e, p.prompt, p.answers, e.target_new)),
        }

    def _grouped(self, name: str, kind: str, score: Callable[[Edit, Probe], float | None]) -> dict[str, Metric]:
        """A metric of the probes of one kind, over all groups and, as "name/group", for each."""
        overall: list[float] = []
        by_group: dict[str, list[float]] = {}
        for edit in self.edits:
            scores: dict[str, list[float | None]] = {}
            for probe in getattr(edit, kind):
                scores.setdefault(probe.group, []).append(score(edit, probe))
            means = {group: mean for group, members in scores.items() for mean in _known_means([members])}
            for group, mean in means.items():
                by_group.setdefault(group, []).append(mean)
            overall += _known_means([list(means.values())])
        return {name: _mean(overall), **{f"{name}/{group}": _mean(means) for group, means in by_group.items()}}

    def _of_other_relations(self, score: Callable[[Edit, Probe], float | None]) -> Metric:
        """A metric of the probes about another relation of the edited subject."""
        asked = [[p for p in e.locality if p.group == OTHER_RELATION and p.answers] for e in self.edits]
        return _mean(_known_means([[score(e, p) for p in found] for e, found in zip(self.edits, asked, strict=True)]))

    def _preferred(self, edit: Edit, prompt: str, right: Sequence[str], other: str | None = None) -> float | None:
        """Whether a right answer is more probable than the other one."""
        if not right or other is None:
            return None
        best = max(self.answers[prompt, target, edit.join].log_prob for target in right)
        return float(best > self.answers[prompt, other, edit.join].log_prob)

    def _exact(self, edit: Edit, prompt: str, right: Sequence[str], other: str | None = None) -> float | None:
        """Whether a right answer is the arg-max at all its tokens."""
        return float(any(self.answers[prompt, target, edit.join].exact for target in right)) if right else None

    def _share(self, edit: Edit, prompt: str, right: Sequence[str], other: str | None = None) -> float | None:
        """Share of a right answer's tokens that are the arg-max."""
        return max(self.answers[prompt, target, edit.join].share for target in right) if right else None


def _continued(model: ModelAdapter, prompts: Sequence[str], seed: int, show: Show) -> list[str]:
    """The prompts with sampled continuations: 100 tokens in all, or twice the longest prompt."""
    if not prompts:
        return []

    length = max(100, 2 * max(len(ids) for ids in encode(model.tokenizer, prompts)[0]))
    with track(length * len(prompts), "writing texts", "tokens", show) as advance:
        rows = sample_tokens(model, prompts, length, 5, seed, progress=advance)
    return model.tokenizer.batch_decode(rows, skip_special_tokens=True)


_Way = Callable[[Edit, str, Sequence[str], str | None], float | None]


# A prompt, a target, and what stands between them (`Edit.join`).
Asked = tuple[str, str, str | None]


def _questions(edit: Edit) -> Iterable[Asked]:
    """Everything that a record asks about."""
    targets = [edit.target_new] + ([edit.target_true] if edit.target_true else [])
    for prompt in (edit.prompt, *edit.rephrase_prompts):
        yield from ((prompt, target, edit.join) for target in targets)
    for probe in edit.locality:
        if probe.answers:
            yield from ((probe.prompt, target, edit.join) for target in (*probe.answers, edit.target_new))
    for probe in edit.portability:
        yield from ((probe.prompt, target, edit.join) for target in probe.answers)


def _whole(share: float | None) -> float | None:
    """1 for a whole share, 0 for a part."""
    return None if share is None else float(share == 1)


def _known_means(records: Iterable[Sequence[float | None]]) -> list[float]:
    """The mean within each record; what cannot be measured does not count, nor does a record without anything else."""
    known = [[score for score in record if score is not None] for record in records]
    return [sum(scores) / len(scores) for scores in known if scores]


def _harmonic_mean(metrics: Sequence[Metric]) -> Metric:
    """None where one of them is; 0 where one is 0."""
    values = [metric.value for metric in metrics if metric.value is not None]
    if len(values) < len(metrics):
        return Metric(None)
    return Metric(len(values) / sum(1 / value for value in values) if min(values) > 0 else 0.0)


def _mean(values: Sequence[float]) -> Metric:
    """The mean with its standard error."""
    if not values:
        return Metric(None)

    mean = sum(values) / len(values)
    if len(values) < 2:
        return Metric(mean)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Metric(mean, math.sqrt(variance / len(values)))


def _text(metric: Metric) -> str:
    if metric.value is None:
        return "n/a"
    digits = 1 if metric.value >= 10 else 3
    error = "" if metric.error is None else f" ±{metric.error:.{digits}f}"
    return f"{metric.value:.{digits}f}{error}"


def fluency(text: str) -> float:
    """n-gram entropy of one text in bits: H2 / 3 + 2 * H3 / 3."""
    words = re.findall(r"\w+|[^\w\s]", text)
    entropies = []
    for n in (2, 3):
        counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        total = sum(counts.values())
        entropies.append(-sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0)
    return entropies[0] / 3 + 2 * entropies[1] / 3
