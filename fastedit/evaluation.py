"""The field's metrics, batched over records, unedited beside edited.

efficacy, generalization, specificity (ES, PS, NS): is the right answer the more probable one, comparing mean token
    log-probabilities of target_new and target_true (locality answer for NS); averaged over records, strict
*_top1: every token of the right answer is the arg-max under teacher forcing (locality: of its answer)
score: harmonic mean of efficacy, generalization and specificity
tokens_unchanged: share of locality answers whose arg-max tokens equal the unedited model's
fluency: 100 * (H2 / 3 + 2 * H3 / 3), H_n the n-gram entropy in bits of texts continued from the prompts (ROME)
perplexity: of a text, windows of 512 tokens
A metric whose fields the records lack is None ("n/a"), never invented.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastedit.adapter import ModelAdapter
from fastedit.attention import CausalPlan
from fastedit.editor import Editor
from fastedit.edits import Edit
from fastedit.forward import TreePass
from fastedit.progress import track
from fastedit.sampling import sample_tokens
from fastedit.scoring import LogitBuffer, score_rows
from fastedit.tokens import TokenSequence, encode, target_sequences

ROW_BUDGET = 2048
LOGIT_ROWS = 128
PERPLEXITY_WINDOW = 512

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


@dataclass(frozen=True)
class Metric:
    """One number with its standard error over records; both None where it cannot be measured."""

    value: float | None
    error: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name of METRICS, of the unedited and of the edited model, on n_records records."""

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
        return [(name, _text(self.unedited[name]), _text(self.edited[name])) for name in METRICS]

    def __str__(self) -> str:
        lines = [f"{'metric':<21}{'unedited':>16}{'edited':>16}   ({self.n_records} records)"]
        lines += [f"{name:<21}{before:>16}{after:>16}" for name, before, after in self.rows()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Answer:
    """How the model scores one target: mean token log-probability, exact arg-max match, and the arg-max tokens."""

    log_prob: float
    exact: bool
    best: tuple[int, ...]


def evaluate(
    editor: Editor,
    edits: Sequence[Edit],
    text: str | None = None,
    text_tokens: int = 20_000,
    fluency_prompts: int = 50,
    show: bool | None = None,
) -> Evaluation:
    """Measure the editor's model as it is and as it was before any edit.

    edits: the records to ask about, usually `run.edits` after the whole stream
    text: for perplexity, its first text_tokens tokens; None = n/a
    fluency_prompts: how many records' prompts are continued for fluency; 0 = n/a
    """
    show = editor.progress if show is None else show
    options = (text, text_tokens, fluency_prompts, editor.seed, show)
    with editor.weights.rewound():
        before = _Measurement.take(editor.model, edits, *options)
    after = _Measurement.take(editor.model, edits, *options)
    return Evaluation(len(edits), before.metrics(before), after.metrics(before))


def compare(
    unedited: ModelAdapter,
    edited: ModelAdapter,
    edits: Sequence[Edit],
    text: str | None = None,
    text_tokens: int = 20_000,
    fluency_prompts: int = 50,
    seed: int = 0,
    show: bool | None = None,
) -> Evaluation:
    """Like `evaluate`, for two models, which may be the same one."""
    options = (text, text_tokens, fluency_prompts, seed, show)
    before = _Measurement.take(unedited, edits, *options)
    after = before if edited is unedited else _Measurement.take(edited, edits, *options)
    return Evaluation(len(edits), before.metrics(before), after.metrics(before))


@dataclass(frozen=True)
class _Measurement:
    edits: Sequence[Edit]
    answers: dict[tuple[str, str], Answer]
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
        show: bool | None,
    ) -> _Measurement:
        pairs = list(dict.fromkeys(pair for edit in edits for pair in _questions(edit)))
        with track(len(pairs), "scoring answers", "answers", show) as advance:
            found = answer(model, pairs, advance)
        prompts = [edit.prompt for edit in edits[:fluency_prompts]]
        rows: list[list[int]] = []
        if prompts:
            length = max(100, 2 * max(len(ids) for ids in encode(model.tokenizer, prompts)[0]))
            with track(length * len(prompts), "writing texts", "tokens", show) as advance:
                rows = sample_tokens(model, prompts, length, 5, seed, progress=advance)
        texts = model.tokenizer.batch_decode(rows, skip_special_tokens=True) if rows else []
        measured = None if text is None else perplexity(model, text, text_tokens, show)
        return cls(edits, dict(zip(pairs, found, strict=True)), texts, measured)

    def metrics(self, unedited: _Measurement) -> dict[str, Metric]:
        """All metrics; `unedited` is what tokens are compared with."""
        found = {
            "efficacy": self._average(lambda e: _preferred(self.answers, [e.prompt], e.target_new, e.target_true)),
            "efficacy_top1": self._average(lambda e: [self.answers[e.prompt, e.target_new].exact]),
            "generalization": self._average(
                lambda e: _preferred(self.answers, e.rephrase_prompts, e.target_new, e.target_true)
            ),
            "generalization_top1": self._average(
                lambda e: [self.answers[p, e.target_new].exact for p in e.rephrase_prompts]
            ),
            "specificity": self._average(
                lambda e: [s for p in e.locality for s in _preferred(self.answers, [p.prompt], p.answer, e.target_new)]
            ),
            "specificity_top1": self._average(
                lambda e: [self.answers[p.prompt, p.answer].exact for p in e.locality if p.answer]
            ),
            "tokens_unchanged": self._average(
                lambda e: [
                    self.answers[p.prompt, p.answer].best == unedited.answers[p.prompt, p.answer].best
                    for p in e.locality
                    if p.answer
                ]
            ),
            "fluency": _mean([100 * fluency(text) for text in self.texts]),
            "perplexity": Metric(self.perplexity),
        }
        parts = [found[name].value for name in ("efficacy", "generalization", "specificity")]
        known = [part for part in parts if part is not None]
        harmonic = None if len(known) < 3 else (3 / sum(1 / p for p in known) if min(known) > 0 else 0.0)
        return {**found, "score": Metric(harmonic)}

    def _average(self, per_record: Callable[[Edit], Iterable[bool]]) -> Metric:
        """Mean over records of the mean within a record; records without such a question do not count."""
        values = []
        for edit in self.edits:
            if hits := list(per_record(edit)):
                values.append(sum(hits) / len(hits))
        return _mean(values)


def _questions(edit: Edit) -> Iterable[tuple[str, str]]:
    """Every (prompt, target) pair a record asks about."""
    targets = [edit.target_new] + ([edit.target_true] if edit.target_true else [])
    for prompt in (edit.prompt, *edit.rephrase_prompts):
        yield from ((prompt, target) for target in targets)
    for probe in edit.locality:
        if probe.answer:
            yield (probe.prompt, probe.answer)
            yield (probe.prompt, edit.target_new)


def _preferred(
    answers: dict[tuple[str, str], Answer], prompts: Iterable[str], right: str | None, other: str | None
) -> list[bool]:
    if not right or not other:
        return []
    return [answers[prompt, right].log_prob > answers[prompt, other].log_prob for prompt in prompts]


def _mean(values: Sequence[float]) -> Metric:
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


@torch.no_grad()
def answer(
    model: ModelAdapter, pairs: Sequence[tuple[str, str]], progress: Callable[[int], None] | None = None
) -> list[Answer]:
    """Score (prompt, target) pairs under teacher forcing. Pairs that begin alike share their rows."""
    sequences = target_sequences(model.tokenizer, [p for p, _ in pairs], [t for _, t in pairs])
    buffer = LogitBuffer()
    found: list[Answer] = []
    with model.packed():
        for group in _groups(sequences):
            tree = TreePass.start(model, [sequence.ids for sequence in group])
            tail = [path[i] for path, s in zip(tree.tree.paths, group, strict=True) for i in s.scored]
            rows = model.run(
                tree.rows,
                range(model.n_layers),
                tree.plan,
                tree.rotary,
                torch.tensor(tail, device=model.device),
            )
            targets = torch.tensor([token for s in group for token in s.targets], device=model.device)
            found += _answers(model, rows, targets, group, buffer)
            if progress is not None:
                progress(len(group))
    return found


def _answers(
    model: ModelAdapter,
    rows: torch.Tensor,
    targets: torch.Tensor,
    group: list[TokenSequence],
    buffer: LogitBuffer,
) -> list[Answer]:
    normed = model.final_norm(rows)
    log_probs: list[float] = []
    best: list[int] = []
    for start in range(0, len(targets), LOGIT_ROWS):
        part = slice(start, start + LOGIT_ROWS)
        scores = score_rows(normed[part], model.head_weight, targets[part], buffer)
        log_probs += scores.log_prob.tolist()
        best += scores.best.tolist()
    found, start = [], 0
    for sequence in group:
        stop = start + len(sequence.targets)
        tokens = tuple(best[start:stop])
        mean = sum(log_probs[start:stop]) / (stop - start)
        found.append(Answer(mean, tokens == sequence.targets, tokens))
        start = stop
    return found


def _groups(sequences: Sequence[TokenSequence]) -> Iterable[list[TokenSequence]]:
    """Neighbouring sequences, up to ROW_BUDGET tokens together."""
    group: list[TokenSequence] = []
    used = 0
    for sequence in sequences:
        if group and used + len(sequence.ids) > ROW_BUDGET:
            yield group
            group, used = [], 0
        group.append(sequence)
        used += len(sequence.ids)
    if group:
        yield group


@torch.no_grad()
def perplexity(model: ModelAdapter, text: str, n_tokens: int = 20_000, show: bool | None = None) -> float:
    """exp of the mean negative log-probability of a text's first n_tokens tokens, in windows of 512."""
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:n_tokens]
    window = min(PERPLEXITY_WINDOW, model.max_positions)
    pieces = [ids[i : i + window] for i in range(0, len(ids), window)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise ValueError("perplexity: the text has fewer than two tokens")
    buffer, total, count = LogitBuffer(), 0.0, 0
    with model.packed(), track(len(pieces), "perplexity", "windows", show) as advance:
        for piece in pieces:
            tokens = torch.tensor(piece, device=model.device)
            rotary = model.rotary(torch.arange(len(piece), device=model.device))
            rows = model.run(model.embed(tokens), range(model.n_layers), CausalPlan(len(piece)), rotary)
            normed = model.final_norm(rows)[:-1]
            for start in range(0, len(normed), LOGIT_ROWS):
                part = slice(start, start + LOGIT_ROWS)
                total -= float(score_rows(normed[part], model.head_weight, tokens[1:][part], buffer).log_prob.sum())
            count += len(piece) - 1
            advance(1)
    return math.exp(total / count)


def fluency(text: str) -> float:
    """n-gram entropy of one text in bits: H2 / 3 + 2 * H3 / 3."""
    words = re.findall(r"\w+|[^\w\s]", text)
    entropies = []
    for n in (2, 3):
        counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        total = sum(counts.values())
        entropies.append(-sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0)
    return entropies[0] / 3 + 2 * entropies[1] / 3
