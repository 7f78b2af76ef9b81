"""The six numbers of MeG and their harmonic mean.

reliability: the edit's own prompt; generality: its first paraphrase; locality: a prompt that must not change.
free: greedy decoding gives exactly the wanted answer (for locality, the base model's answer)
forced: share of the wanted answer's tokens that are the arg-max under teacher forcing (for locality, share of the
    positions of the base model's answer at which edited and base model have the same arg-max); without full stop and
    end token
score: the harmonic mean of the six

Corrections of the published evaluation: targets are tokenised inside the whole text, so that a beginning-of-text token
is never taken for the answer (there, Llama-3's numbers come out near zero); answers of base and edited model are
decoded with the same limit and cut in the same way, so that an unedited model has locality 100; a paraphrase is checked
to be a text (there, a failed parse leaves single characters); and all answers are compared by one function,
`same_answer`, which handles case and full stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastedit.evaluation.answers import agreement
from fastedit.methods.meg.fit import wrap
from fastedit.methods.meg.neuron import NeuronForm, respond
from fastedit.methods.meg.passes import UpperRows, best_tokens, group_by_rows
from fastedit.methods.meg.serve import Decision, Server, chosen, decode
from fastedit.model.adapter import ModelAdapter
from fastedit.model.logits import LogitBuffer
from fastedit.model.tokens import TokenSequence, prompt_ids, target_sequences
from fastedit.records.edit import Edit
from fastedit.runtime.progress import Show, track

NAMES = ("reliability", "generality", "locality")


@dataclass(frozen=True)
class SixMetrics:
    """Means over records in percent, each (free, forced); None if no record has such a question.

    accepted: by number, the share of its prompts that the gate lets in, in percent
    nearest: share of paraphrases whose nearest edit is their own, in percent
    unsolved: edits whose fit failed, and how many of their prompts the gate lets in
    """

    n_records: int
    reliability: tuple[float, float] | None
    generality: tuple[float, float] | None
    locality: tuple[float, float] | None
    accepted: dict[str, float]
    nearest: float | None = None
    unsolved: tuple[int, int] = (0, 0)

    @property
    def score(self) -> float | None:
        """Harmonic mean of the six, in percent."""
        pairs = [getattr(self, name) for name in NAMES]
        return None if None in pairs else harmonic_mean([number for pair in pairs for number in pair])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        numbers: dict[str, float | None] = {}
        for name in NAMES:
            pair = getattr(self, name)
            numbers[f"{name}_free"], numbers[f"{name}_forced"] = (None, None) if pair is None else pair

        gate = {"accepted": self.accepted, "nearest": self.nearest, "unsolved": list(self.unsolved)}
        return {"n_records": self.n_records, **numbers, "score": self.score, **gate}


def harmonic_mean(numbers: Sequence[float]) -> float:
    """n / sum(1 / x); 0 if a number is not positive."""
    return len(numbers) / sum(1 / x for x in numbers) if min(numbers) > 0 else 0.0


def same_answer(answer: str, wanted: str, ignore_case: bool) -> bool:
    """Whether two answers are equal up to the first line break, without outer spaces and final full stops.

    ignore_case: True for reliability and generality, False for locality, as published"""
    left, right = clean(answer), clean(wanted)
    return left.casefold() == right.casefold() if ignore_case else left == right


def clean(answer: str) -> str:
    """An answer as `same_answer` compares it."""
    return answer.strip().partition("\n")[0].rstrip(" .")


@dataclass(frozen=True)
class Asked:
    """Prompts of one kind: the index of each prompt's record, and its wanted answer, the target of the edit."""

    records: list[int]
    prompts: list[str]
    wanted: list[str]


def questions(edits: Sequence[Edit]) -> dict[str, Asked]:
    """The prompts behind each pair of numbers. Raises TypeError for a prompt that is no text, ValueError for one of a
    single character."""
    asked = {name: Asked([], [], []) for name in NAMES}
    for i, edit in enumerate(edits):
        prompts = [("reliability", edit.prompt)]
        prompts += [("generality", text) for text in edit.rephrase_prompts[:1]]
        prompts += [("locality", probe.prompt) for probe in edit.locality[:1]]

        for name, prompt in prompts:
            if not isinstance(prompt, str):
                raise TypeError(f"case {edit.case_id}: a prompt for {name} must be a text, got {type(prompt).__name__}")
            if len(prompt) < 2:
                raise ValueError(f"case {edit.case_id}: a prompt for {name} must be a text, got {prompt!r}")
            asked[name].records.append(i)
            asked[name].prompts.append(prompt)
            asked[name].wanted.append(edit.target_new)
    return asked


@dataclass(frozen=True)
class Reference:
    """The base model's answers by kind of question, which every server is compared with."""

    answers: dict[str, list[str]]


def ask_base(model: ModelAdapter, edits: Sequence[Edit], template: str, n_tokens: int, show: Show) -> Reference:
    """Decode every question on the base model, at most n_tokens tokens each."""
    asked = questions(edits)
    total = sum(len(part.prompts) for part in asked.values())
    answers = {}

    with track(total, "asking the base model", "prompts", show) as advance:
        for name, part in asked.items():
            texts = [wrap(template, prompt) for prompt in part.prompts]
            answers[name] = decode(model, texts, n_tokens, progress=advance)
    return Reference(answers)


def measure(
    server: Server | None,
    model: ModelAdapter,
    edits: Sequence[Edit],
    reference: Reference,
    template: str,
    n_tokens: int,
    layer: int,
    show: Show = None,
) -> SixMetrics:
    """The six numbers of a server; None: those of the base model.

    reference: `ask_base` of the same edits, template and n_tokens; layer: of the neurons
    Prompts that the gate rejects are not decoded again: the base model's answers are theirs, bit for bit."""
    pairs: dict[str, tuple[float, float] | None] = {}
    accepted: dict[str, float] = {}
    near: float | None = None
    unsolved = (0, 0)

    for name, part in questions(edits).items():
        if not part.prompts:
            pairs[name] = None
            continue

        decision = None if server is None else server.decide(part.prompts)
        base = reference.answers[name]
        texts = [wrap(template, prompt) for prompt in part.prompts]
        answers = base
        if server is not None and decision is not None:
            answers = _served_answers(server, texts, base, decision, n_tokens, name, show)
            accepted[name] = 100 * int(decision.active.sum()) / len(texts)
            known = torch.tensor(part.records)
            if name == "generality" and len(server.store) == len(edits):
                near = 100 * float((decision.nearest == known).float().mean())
            if name == "reliability" and len(server.store) == len(edits):
                failed = ~server.store.solved
                unsolved = (int(failed.sum()), int((failed[known] & decision.active).sum()))

        wanted = base if name == "locality" else part.wanted
        free = [same_answer(a, b, ignore_case=name != "locality") for a, b in zip(answers, wanted, strict=True)]
        form = None if server is None else server.store.form
        forced = _forced_shares(model, name, texts, wanted, decision, form, layer)
        pairs[name] = (100 * sum(free) / len(free), 100 * sum(forced) / len(forced))

    return SixMetrics(len(edits), **pairs, accepted=accepted, nearest=near, unsolved=unsolved)


def _served_answers(
    server: Server,
    texts: Sequence[str],
    base: Sequence[str],
    decision: Decision,
    n_tokens: int,
    name: str,
    show: Show,
) -> list[str]:
    """Answers of a server to texts: decoded for those inside the gate, the base model's for the others."""
    answers = list(base)
    inside = decision.active.nonzero().flatten().tolist()
    with track(len(inside), f"measuring {name}", "prompts", show) as advance:
        picked = [texts[i] for i in inside]
        decoded = decode(server.adapter, picked, n_tokens, chosen(decision, inside), server.serving, progress=advance)
    for i, answer in zip(inside, decoded, strict=True):
        answers[i] = answer
    return answers


def _forced_shares(
    model: ModelAdapter,
    name: str,
    texts: Sequence[str],
    wanted: Sequence[str],
    decision: Decision | None,
    form: NeuronForm | None,
    layer: int,
) -> list[float]:
    """Per text, the share of scored positions that are right under teacher forcing, in 0-1."""
    sequences = forced_sequences(model, texts, [clean(answer) if name == "locality" else answer for answer in wanted])
    base, edited = forced_tokens(model, sequences, layer, decision, form)
    if name == "locality":
        return [agreement(a, b) for a, b in zip(edited, base, strict=True)]
    return [agreement(a, s.targets) for a, s in zip(edited, sequences, strict=True)]


def forced_sequences(model: ModelAdapter, texts: Sequence[str], answers: Sequence[str]) -> list[TokenSequence]:
    """Texts followed by their answers, whose tokens are scored; with an empty answer, the position after the text."""
    filled = [i for i, answer in enumerate(answers) if answer.strip()]
    scored = target_sequences(model.tokenizer, [texts[i] for i in filled], [answers[i] for i in filled])
    answered = dict(zip(filled, scored, strict=True))

    ids = prompt_ids(model.tokenizer, texts)
    return [answered.get(i, TokenSequence(tuple(ids[i]), -1, (len(ids[i]) - 1,), (0,))) for i in range(len(texts))]


@torch.no_grad()
def forced_tokens(
    model: ModelAdapter,
    sequences: Sequence[TokenSequence],
    layer: int,
    decision: Decision | None,
    form: NeuronForm | None,
    token_budget: int = 2048,
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Arg-max tokens at the scored positions, (of the base model, of the edited one), both on the same packed rows."""
    base: list[tuple[int, ...]] = [()] * len(sequences)
    edited: list[tuple[int, ...]] = [()] * len(sequences)
    buffer = LogitBuffer()

    with model.packed():
        for group in group_by_rows(sequences, token_budget):
            rows = UpperRows.start(model, [sequences[i] for i in group], layer)
            before = best_tokens(model, rows, None, buffer)
            after = before
            if decision is not None and form is not None:
                part = chosen(decision, group)
                if bool(part.active.any()):
                    flat = (part.flat * part.active[:, None]).to(rows.inputs.device)
                    after = best_tokens(model, rows, respond(form, flat, rows.inputs, rows.owner).output, buffer)

            for i, plain, changed in zip(group, before, after, strict=True):
                base[i] = plain
                edited[i] = changed
    return base, edited
