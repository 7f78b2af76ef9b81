"""Every check on a stream of edits that needs no weights, made before the first weight is touched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fastedit.records.edit import Edit, EditSet, InvalidEdits, Problem, show

ON_INVALID = ("refuse", "skip")

# Texts tokenised in one call: enough to keep a fast tokenizer busy, few enough that their offsets stay small.
GROUP = 1024


class Checked(NamedTuple):
    """Batches of edits that can be written, and what was wrong with the edits that were left out."""

    batches: tuple[EditSet, ...]
    skipped: tuple[Problem, ...] = ()


def check_on_invalid(on_invalid: str) -> None:
    """Raise ValueError unless `on_invalid` is one of ON_INVALID."""
    if on_invalid not in ON_INVALID:
        raise ValueError(f"on_invalid must be 'refuse' or 'skip', got {on_invalid!r}")


def named(edit: Edit, position: int) -> Edit:
    """The edit, named by `position` if it has no case_id."""
    return edit if edit.case_id is not None else edit.model_copy(update={"case_id": position})


def repeated(holders: dict[str, str], case_id: int | str | None, holder: str) -> list[Problem]:
    """A problem if `case_id` has a holder already; otherwise `holder` becomes it."""
    if case_id is None:
        return []
    # 5 and "5" count as one id: they would share a name in every report and journal.
    if (key := str(case_id)) in holders:
        return [Problem(f"must be unique, but {case_id!r} already names {holders[key]}", "case_id", case_id)]
    holders[key] = holder
    return []


def check_edits(
    edits: Sequence[Edit],
    batch_size: int,
    *,
    tokenizer: Any = None,
    max_positions: int | None = None,
    template_tokens: int = 0,
    on_invalid: str = "refuse",
) -> Checked:
    """Judge edits as a whole and cut them into batches of `batch_size`.

    Edits without a case_id are named by their position. No case_id may stand twice, and no batch may hold one
    (prompt, subject) with two targets; across batches that is fine, the later one wins.
    tokenizer: a fast transformers tokenizer, since character offsets are needed. The subject and every text that
        is scored after a prompt must each give a token. Prompt, target and special tokens, together with
        `template_tokens` (those of the longest context template), must fit into `max_positions`; so must what is
        only measured, without a template
    on_invalid: "refuse" raises on any problem; "skip" leaves out the edits that have one. No other edit changes its
        batch, so that leaving one out makes no other wrong

    Raises `InvalidEdits` with all problems, also if nothing is left; `TypeError` for a slow tokenizer;
    `ValueError` for `max_positions` without a tokenizer and for other values of on_invalid.
    """
    check_on_invalid(on_invalid)
    if tokenizer is None and max_positions is not None:
        raise ValueError(f"check_edits: max_positions={max_positions} needs a tokenizer, got None")
    if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"check_edits: tokenizer must be a fast one, got {type(tokenizer).__name__}")
    if len(edits) == 0:
        raise InvalidEdits([Problem("no edits to write")])
    known = edits if isinstance(edits, EditSet) else EditSet(tuple(edits))
    known = replace(known, edits=tuple(named(e, at) if isinstance(e, Edit) else e for at, e in enumerate(known)))
    found = _Findings(known)
    for index, edit in enumerate(known):
        found.add(index, _object_problems(edit))
    if tokenizer is not None:
        sound = [index for index in range(len(known)) if index not in found.by_index]
        for index, problem in _token_problems(known, sound, tokenizer, max_positions, template_tokens):
            found.add(index, [problem])
    batches = _batches(known, batch_size, found)
    problems = found.in_order()
    if problems and (on_invalid == "refuse" or not batches):
        raise InvalidEdits(problems)
    return Checked(batches, problems)


class _Findings:
    """Problems by the edit they belong to, each with its place."""

    def __init__(self, edits: EditSet) -> None:
        self.edits = edits
        self.by_index: dict[int, list[Problem]] = {}

    def add(self, index: int, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.by_index.setdefault(index, []).append(self._placed(problem, index))

    def in_order(self) -> tuple[Problem, ...]:
        return tuple(problem for index in sorted(self.by_index) for problem in self.by_index[index])

    def holder(self, index: int) -> str:
        place = self._placed(Problem(""), index)
        at = place.source if place.line is None else f"line {place.line}"
        return f"case {place.case_id} ({at})"

    def _placed(self, problem: Problem, index: int) -> Problem:
        case_id = getattr(self.edits[index], "case_id", None)
        if self.edits.lines:
            return replace(problem, case_id=case_id, line=self.edits.lines[index], source=self.edits.source)
        return replace(problem, case_id=case_id, source=f"edits[{index}]")


def _object_problems(edit: object) -> Sequence[Problem]:
    if not isinstance(edit, Edit):
        return [Problem(f"must be an Edit, got {show(edit)}")]
    try:
        # `model_copy(update=...)` changes fields without a check.
        Edit(**dict(edit))
    except InvalidEdits as error:
        return error.problems
    return []


def _batches(edits: EditSet, size: int, found: _Findings) -> tuple[EditSet, ...]:
    """The edits without a problem, each in its batch; what only shows beside other edits is added to `found`."""
    ids: dict[str, str] = {}
    batches: list[list[int]] = []
    for start in range(0, len(edits), size):
        batch: list[int] = []
        wanted: dict[tuple[str, str], int] = {}
        for index in range(start, min(start + size, len(edits))):
            edit = edits[index]
            found.add(index, repeated(ids, getattr(edit, "case_id", None), found.holder(index)))
            if index in found.by_index:
                continue
            first = wanted.setdefault((edit.prompt, edit.subject), index)
            if edits[first].target_new == edit.target_new:
                batch.append(index)
                continue
            wrong = (
                f"{show(edit.target_new)} contradicts {found.holder(first)}, which wants "
                f"{show(edits[first].target_new)} after the same prompt; put them in different batches"
            )
            found.add(index, [Problem(wrong, "target_new")])
        batches.append(batch)
    return tuple(_chosen(edits, batch) for batch in batches if batch)


def _chosen(edits: EditSet, indices: Sequence[int]) -> EditSet:
    lines = tuple(edits.lines[index] for index in indices) if edits.lines else ()
    return replace(edits, edits=tuple(edits[index] for index in indices), lines=lines, skipped=())


class _Scored(NamedTuple):
    """A text that is scored after a prompt, the number of its edit, and the fields that both come from."""

    number: int
    prompt: str
    target: str
    prompt_field: str
    target_field: str


def _scored_texts(edit: Edit, index: int) -> Iterator[_Scored]:
    """What is learned, then what is measured."""
    yield _Scored(index, edit.prompt, edit.target_new, "prompt", "target_new")
    if edit.target_true is not None:
        yield _Scored(index, edit.prompt, edit.target_true, "prompt", "target_true")
    for number, prompt in enumerate(edit.rephrase_prompts):
        yield _Scored(index, prompt, edit.target_new, f"rephrase_prompts[{number}]", "target_new")
    for field in ("locality", "portability"):
        for number, probe in enumerate(getattr(edit, field)):
            for place, answer in enumerate(probe.answers):
                at = f"{field}[{number}]"
                yield _Scored(index, probe.prompt, answer, f"{at}.prompt", f"{at}.answers[{place}]")


def _token_problems(
    edits: EditSet, sound: Iterable[int], tokenizer: Any, max_positions: int | None, template_tokens: int
) -> Iterator[tuple[int, Problem]]:
    """(index, problem) for texts that give no token or too many."""
    texts = [text for index in sound for text in _scored_texts(edits[index], index)]
    told: set[tuple[int, str]] = set()
    for begin in range(0, len(texts), GROUP):
        group = texts[begin : begin + GROUP]
        whole = [f"{text.prompt} {text.target}" for text in group]
        spans = tokenizer(whole, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        for text, tokens in zip(group, spans, strict=True):
            edit = edits[text.number] if text.prompt_field == "prompt" else None
            for problem in _text_problems(text, edit, tokens, max_positions, template_tokens if edit else 0):
                if (text.number, str(problem.field)) not in told:
                    told.add((text.number, str(problem.field)))
                    yield text.number, problem


def _text_problems(
    text: _Scored,
    edit: Edit | None,
    tokens: Sequence[tuple[int, int]],
    max_positions: int | None,
    template_tokens: int,
) -> Iterator[Problem]:
    """`tokens`: the character offsets of each token of "prompt target"; special tokens have (0, 0)."""
    target_at = len(text.prompt) + 1
    places = {text.target_field: (text.target, target_at, target_at + len(text.target))}
    if edit is not None:
        places["subject"] = (edit.subject, *edit.subject_span)
    for field, (written, start, end) in places.items():
        if not any(token_start < end and token_end > start for token_start, token_end in tokens):
            yield Problem(f"must give at least one token, got none from {show(written)}", field)
    needed = len(tokens) + template_tokens
    if max_positions is not None and needed > max_positions:
        also = f", {template_tokens} of the longest template" if template_tokens else ""
        wrong = (
            f"must fit into the model's {max_positions} positions, got {needed} tokens "
            f"({len(tokens)} of prompt and target{also})"
        )
        yield Problem(wrong, text.prompt_field)
