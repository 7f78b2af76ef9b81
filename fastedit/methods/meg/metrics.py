"""The six numbers of MeG and their harmonic mean.

reliability: the edit's own prompt; generality: its first paraphrase; locality: a prompt that must not change.
free: greedy decoding gives exactly the wanted answer (for locality, the base model's own answer)
forced: share of the wanted answer's tokens that are the arg-max under teacher forcing (for locality, share of places at
    which edited and base model have one arg-max, after the base model's own answer); no full stop, no end token
score: the harmonic mean of the six

What the published evaluation gets wrong is done right here: targets are tokenised inside the whole text, so that a
beginning-of-text token is never taken for the answer (its Llama-3 numbers come out near zero); the base model's answers
are decoded with the limit and the cutting of the edited model's, so that an untouched model has locality 100; a
paraphrase is checked to be a text (there, a failed parse made single characters of it); and answers are compared in one
function, `same_answer`, which is where upper and lower case and full stops are dealt with.
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
from fastedit.model.tokens import TokenSequence, encode, target_sequences
from fastedit.records.edit import Edit
from fastedit.runtime.progress import track

NAMES = ("reliability", "generality", "locality")


@dataclass(frozen=True)
class SixMetrics:
    """Means over records in percent, each (free, forced); None where no record asks.

    accepted: share of own prompts, paraphrases and unrelated prompts inside the gate, in percent
    nearest: share of paraphrases whose nearest edit is their own
    unsolved: edits whose fit failed, and how many of their prompts still pass the gate"""

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
        pairs = {name: getattr(self, name) for name in NAMES}
        numbers = {
            f"{n}_{way}": None if p is None else p[i]
            for n, p in pairs.items()
            for i, way in enumerate(("free", "forced"))
        }
        beside = {"accepted": self.accepted, "nearest": self.nearest, "unsolved": list(self.unsolved)}
        return {"n_records": self.n_records, **numbers, "score": self.score, **beside}


def harmonic_mean(numbers: Sequence[float]) -> float:
    """n / sum(1 / x); 0 when one is."""
    return len(numbers) / sum(1 / x for x in numbers) if min(numbers) > 0 else 0.0


def same_answer(answer: str, wanted: str, ignore_case: bool) -> bool:
    """Whether two answers are one: up to the first line break, without outer spaces and final full stops.

    ignore_case: True for reliability and generality, False for locality, as published"""
    left, right = clean(answer), clean(wanted)
    return left.casefold() == right.casefold() if ignore_case else left == right


def clean(answer: str) -> str:
    """An answer as it is compared."""
    return answer.strip().partition("\n")[0].rstrip(" .")


@dataclass(frozen=True)
class Asked:
    """Prompts of one kind: whose record each is, and the wanted answer (for locality what the base model says)."""

    records: list[int]
    prompts: list[str]
    wanted: list[str]


def questions(edits: Sequence[Edit]) -> dict[str, Asked]:
    """What the six numbers ask. Raises TypeError for a paraphrase that is no text, ValueError for one character."""
    asked = {name: Asked([], [], []) for name in NAMES}
    for i, edit in enumerate(edits):
        found = [("reliability", edit.prompt)]
        found += [("generality", text) for text in edit.rephrase_prompts[:1]]
        found += [("locality", probe.prompt) for probe in edit.locality[:1]]
        for name, prompt in found:
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
    """The base model's answers: texts by kind of question. Made once, used for every way of serving."""

    answers: dict[str, list[str]]


def ask_base(model: ModelAdapter, edits: Sequence[Edit], template: str, n_tokens: int, show: bool | None) -> Reference:
    """Decode every question on the base model."""
    asked = questions(edits)
    total = sum(len(part.prompts) for part in asked.values())
    with track(total, "asking the base model", "prompts", show) as advance:
        return Reference(
            {
                name: decode(model, [wrap(template, p) for p in part.prompts], n_tokens, progress=advance)
                for name, part in asked.items()
            }
        )


def measure(
    server: Server | None,
    model: ModelAdapter,
    edits: Sequence[Edit],
    reference: Reference,
    template: str,
    n_tokens: int,
    layer: int,
    show: bool | None = None,
) -> SixMetrics:
    """The six numbers of a server, or of the base model where it is None.

    reference: `ask_base` of the same edits, template and n_tokens; layer: of the neurons
    Prompts outside the gate are not decoded again: theirs are the base model's answers, bit for bit."""
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
        said = list(base)
        if server is not None and decision is not None:
            inside = decision.active.nonzero().flatten().tolist()
            with track(len(inside), f"measuring {name}", "prompts", show) as advance:
                picked = [texts[i] for i in inside]
                made = decode(model, picked, n_tokens, chosen(decision, inside), server.serving, progress=advance)
            for i, answer in zip(inside, made, strict=True):
                said[i] = answer
            accepted[name] = 100 * len(inside) / len(texts)
            known = torch.tensor(part.records)
            if name == "generality" and len(server.store) == len(edits):
                near = 100 * float((decision.nearest == known).float().mean())
            if name == "reliability" and len(server.store) == len(edits):
                failed = ~server.store.solved
                unsolved = (int(failed.sum()), int((failed[known] & decision.active).sum()))
        wanted = base if name == "locality" else part.wanted
        free = [same_answer(a, b, ignore_case=name != "locality") for a, b in zip(said, wanted, strict=True)]
        form = None if server is None else server.store.form
        forced = _forced_shares(model, name, texts, wanted, decision, form, layer)
        pairs[name] = (100 * sum(free) / len(free), 100 * sum(forced) / len(forced))
    return SixMetrics(len(edits), **pairs, accepted=accepted, nearest=near, unsolved=unsolved)


def _forced_shares(
    model: ModelAdapter,
    name: str,
    texts: Sequence[str],
    wanted: Sequence[str],
    decision: Decision | None,
    form: NeuronForm | None,
    layer: int,
) -> list[float]:
    sequences = forced_sequences(model, texts, [clean(answer) if name == "locality" else answer for answer in wanted])
    base, edited = forced_tokens(model, sequences, layer, decision, form)
    if name == "locality":
        return [agreement(a, b) for a, b in zip(edited, base, strict=True)]
    return [agreement(a, s.targets) for a, s in zip(edited, sequences, strict=True)]


def forced_sequences(model: ModelAdapter, texts: Sequence[str], answers: Sequence[str]) -> list[TokenSequence]:
    """Texts with their answers, whose tokens are scored; of an empty answer, the one place after the text."""
    filled = [i for i, answer in enumerate(answers) if answer.strip()]
    scored = target_sequences(model.tokenizer, [texts[i] for i in filled], [answers[i] for i in filled])
    found = dict(zip(filled, scored, strict=True))
    ids, _ = encode(model.tokenizer, texts)
    return [found.get(i, TokenSequence(tuple(ids[i]), -1, (len(ids[i]) - 1,), (0,))) for i in range(len(texts))]


@torch.no_grad()
def forced_tokens(
    model: ModelAdapter,
    sequences: Sequence[TokenSequence],
    layer: int,
    decision: Decision | None,
    form: NeuronForm | None,
    token_budget: int = 2048,
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Arg-max tokens at the scored places, (of the base model, of the edited one). Both run on the same packed rows."""
    base: list[tuple[int, ...]] = [()] * len(sequences)
    edited: list[tuple[int, ...]] = [()] * len(sequences)
    buffer = LogitBuffer()
    with model.packed():
        for group in group_by_rows(sequences, token_budget):
            rows = UpperRows.start(model, [sequences[i] for i in group], layer)
            plain = best_tokens(model, rows, None, buffer)
            other = plain
            if decision is not None and form is not None:
                part = chosen(decision, group)
                if bool(part.active.any()):
                    flat = (part.flat * part.active[:, None]).to(rows.inputs.device)
                    other = best_tokens(model, rows, respond(form, flat, rows.inputs, rows.owner).output, buffer)
            for i, before, after in zip(group, plain, other, strict=True):
                base[i], edited[i] = before, after
    return base, edited
