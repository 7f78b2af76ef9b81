"""Checks on a stream of edits, all made before the first weight is changed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

from fastedit.records.edit import NO_SUBJECT, Edit, EditSet, InvalidEdits, Problem, show
from fastedit.records.join import Joined, joined, opening
from fastedit.records.subjects import places_of
from fastedit.runtime.words import counted

log = logging.getLogger(__name__)

OnInvalid = Literal["refuse", "skip"]
ON_INVALID: tuple[OnInvalid, ...] = get_args(OnInvalid)

# Edits that a warning names.
NAMED = 3

# Texts tokenised in one call: enough to occupy a fast tokenizer, few enough that their offsets need little memory.
GROUP = 1024


class Checked(NamedTuple):
    """Batches of edits that can be written, and the problems of the edits that were left out."""

    batches: tuple[EditSet, ...]
    skipped: tuple[Problem, ...] = ()


def check_on_invalid(on_invalid: str) -> None:
    """Raise ValueError unless `on_invalid` is one of ON_INVALID."""
    if on_invalid not in ON_INVALID:
        raise ValueError(f"on_invalid must be 'refuse' or 'skip', got {on_invalid!r}")


def with_case_id(edit: Edit, position: int) -> Edit:
    """The edit, with `position` as its case_id if it has none."""
    return edit if edit.case_id is not None else edit.model_copy(update={"case_id": position})


def claim_case_id(owners: dict[str, str], case_id: int | str | None, owner: str) -> list[Problem]:
    """Enter `owner` as the owner of `case_id` into `owners`, or return a problem if the case_id has another one."""
    if case_id is None:
        return []

    # 5 and "5" count as one id, because they would have one name in every report and run log.
    key = str(case_id)
    if key in owners:
        return [Problem(f"must be unique, but {case_id!r} already names {owners[key]}", "case_id", case_id)]

    owners[key] = owner

    return []


def check_edits(
    edits: Sequence[Edit],
    batch_size: int,
    *,
    tokenizer: Any = None,
    max_positions: int | None = None,
    template_tokens: int = 0,
    on_invalid: OnInvalid = "refuse",
    needs_subject: bool = True,
    n_embeddings: int | None = None,
) -> Checked:
    """Check edits and cut them into batches of `batch_size`.

    An edit without a case_id gets its position as one. No case_id may occur twice. No batch may have two targets for
    one (prompt, subject); in different batches they are allowed, and the later one overwrites the earlier.

    tokenizer: a fast transformers tokenizer, since character offsets are needed; None leaves out the checks that need
        it: the subject, and every text that is scored after a prompt, must have at least one token
    max_positions: the largest number of tokens of a prompt and target with special tokens; None = any. For the edit's
        own prompt `template_tokens`, those of the longest context template, are added
    on_invalid: "refuse" raises on any problem; "skip" leaves out the edits that have one. The other edits stay in
        their batches, so that leaving one out causes no problem in another
    needs_subject: whether every edit must have a subject, see `Method.needs_subject`. A warning then names edits whose
        prompt names the subject several times, and the place that is edited
    n_embeddings: rows of the model's embedding; None = any token may occur

    Raises `InvalidEdits` with all problems, also if no edit is left; `TypeError` for a tokenizer that is not fast;
    `ValueError` for `max_positions` without a tokenizer and for other values of on_invalid.
    """
    check_on_invalid(on_invalid)
    if tokenizer is None and max_positions is not None:
        raise ValueError(f"check_edits: max_positions={max_positions} needs a tokenizer, got None")
    if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"check_edits: tokenizer must be a fast one, got {type(tokenizer).__name__}")

    if len(edits) == 0:
        raise InvalidEdits([Problem("no edits to write")])

    edit_set = edits if isinstance(edits, EditSet) else EditSet(tuple(edits))
    named = (with_case_id(edit, at) if isinstance(edit, Edit) else edit for at, edit in enumerate(edit_set))
    edit_set = replace(edit_set, edits=tuple(named))

    problems = _Problems(edit_set)
    for index, edit in enumerate(edit_set):
        problems.add(index, _object_problems(edit, needs_subject))
    if tokenizer is not None:
        valid = [index for index in range(len(edit_set)) if index not in problems.by_index]
        for index, problem in _token_problems(edit_set, valid, tokenizer, max_positions, template_tokens, n_embeddings):
            problems.add(index, [problem])
    batches = _batches(edit_set, batch_size, problems)

    in_order = problems.in_order()
    if in_order and (on_invalid == "refuse" or not batches):
        raise InvalidEdits(in_order)

    if needs_subject:
        _warn_of_places(edit_set, [index for index in range(len(edit_set)) if index not in problems.by_index], problems)

    return Checked(batches, in_order)


def _warn_of_places(edits: EditSet, indices: Sequence[int], problems: _Problems) -> None:
    """Warn of edits whose subject stands several times in the prompt."""
    several = [i for i in indices if len(places_of(str(edits[i].subject), edits[i].prompt)) > 1]
    if not several:
        return

    named = [
        f"{problems.name_of(i)}: {show(edits[i].subject)} is edited at character {edits[i].subject_span[0]} of "
        f"{show(edits[i].prompt)}"
        for i in several[:NAMED]
    ]
    more = f"; and {len(several) - NAMED} more" if len(several) > NAMED else ""
    log.warning(
        "%s subject several times in the prompt; {} in the prompt says where it is edited, without it the last place"
        " is taken; %s%s",
        counted(len(several), "edit names its", "edits name their"),
        "; ".join(named),
        more,
    )


class _Problems:
    """The problems of a set of edits, by index, each with its case_id and its place in the file or list."""

    def __init__(self, edits: EditSet) -> None:
        self.edits = edits
        self.by_index: dict[int, list[Problem]] = {}

    def add(self, index: int, problems: Iterable[Problem]) -> None:
        """Add problems of the edit `index`."""
        for problem in problems:
            self.by_index.setdefault(index, []).append(self._placed(problem, index))

    def in_order(self) -> tuple[Problem, ...]:
        """All problems, in the order of the edits."""
        return tuple(problem for index in sorted(self.by_index) for problem in self.by_index[index])

    def name_of(self, index: int) -> str:
        """The name of an edit in messages about another one: "case 7 (line 12)"."""
        placed = self._placed(Problem(""), index)
        place = placed.source if placed.line is None else f"line {placed.line}"

        return f"case {placed.case_id} ({place})"

    def _placed(self, problem: Problem, index: int) -> Problem:
        """The problem with the case_id and the place of the edit `index`."""
        case_id = getattr(self.edits[index], "case_id", None)

        if self.edits.lines:
            return replace(problem, case_id=case_id, line=self.edits.lines[index], source=self.edits.source)

        return replace(problem, case_id=case_id, source=f"edits[{index}]")


def _object_problems(edit: object, needs_subject: bool) -> Sequence[Problem]:
    """The problems of a single edit that need no tokenizer."""
    if not isinstance(edit, Edit):
        return [Problem(f"must be an Edit, got {show(edit)}")]

    try:
        # Checked again, because `model_copy(update=...)` sets fields without a check.
        Edit(**dict(edit))
    except InvalidEdits as error:
        return error.problems

    return [Problem(NO_SUBJECT, "subject")] if needs_subject and edit.subject is None else []


def _batches(edits: EditSet, size: int, problems: _Problems) -> tuple[EditSet, ...]:
    """The edits without a problem, each in its batch. Conflicts between edits are added to `problems`."""
    owners: dict[str, str] = {}
    batches: list[EditSet] = []

    for start in range(0, len(edits), size):
        batch: list[int] = []
        first_index: dict[tuple[str, str | None], int] = {}

        for index in range(start, min(start + size, len(edits))):
            edit = edits[index]
            problems.add(index, claim_case_id(owners, getattr(edit, "case_id", None), problems.name_of(index)))
            if index in problems.by_index:
                continue

            first = first_index.setdefault((opening(edit.prompt), edit.subject), index)
            if _trained(edits[first]) == _trained(edit):
                batch.append(index)
                continue

            message = (
                f"{show(edit.target_new)} contradicts {problems.name_of(first)}, which wants "
                f"{show(edits[first].target_new)} after the same prompt; put them in different batches"
            )
            problems.add(index, [Problem(message, "target_new")])

        if batch:
            batches.append(_subset(edits, batch))

    return tuple(batches)


def _trained(edit: Edit) -> str:
    """The text that an edit trains."""
    return joined(edit.prompt, edit.target_new, edit.join).text


def _subset(edits: EditSet, indices: Sequence[int]) -> EditSet:
    """The edits at `indices`, with their lines."""
    lines = tuple(edits.lines[index] for index in indices) if edits.lines else ()

    return replace(edits, edits=tuple(edits[index] for index in indices), lines=lines, skipped=())


class _Scored(NamedTuple):
    """A text that is scored after a prompt, the index of its edit, and the fields that both come from."""

    edit_index: int
    prompt: str
    target: str
    prompt_field: str
    target_field: str


def _scored_texts(edit: Edit, index: int) -> Iterator[_Scored]:
    """All texts of an edit that are scored: first the ones that are trained, then those that are only measured."""
    yield _Scored(index, edit.prompt, edit.target_new, "prompt", "target_new")
    if edit.target_true is not None:
        yield _Scored(index, edit.prompt, edit.target_true, "prompt", "target_true")

    for number, prompt in enumerate(edit.rephrase_prompts):
        yield _Scored(index, prompt, edit.target_new, f"rephrase_prompts[{number}]", "target_new")

    for field in ("locality", "portability"):
        for number, probe in enumerate(getattr(edit, field)):
            place = f"{field}[{number}]"
            for i, answer in enumerate(probe.answers):
                yield _Scored(index, probe.prompt, answer, f"{place}.prompt", f"{place}.answers[{i}]")


def _token_problems(
    edits: EditSet,
    indices: Iterable[int],
    tokenizer: Any,
    max_positions: int | None,
    template_tokens: int,
    n_embeddings: int | None,
) -> Iterator[tuple[int, Problem]]:
    """(index, problem) for texts of the edits at `indices` that have no token, too many, or one without an embedding.

    Once per field."""
    texts = [text for index in indices for text in _scored_texts(edits[index], index)]
    reported: set[tuple[int, str]] = set()

    for start in range(0, len(texts), GROUP):
        group = texts[start : start + GROUP]
        whole = [joined(text.prompt, text.target, edits[text.edit_index].join) for text in group]
        encoded = tokenizer([text.text for text in whole], return_offsets_mapping=True, verbose=False)

        for at, (text, both) in enumerate(zip(group, whole, strict=True)):
            tokens, ids = encoded["offset_mapping"][at], encoded["input_ids"][at]
            for field, problem in _unknown_tokens(text, both, tokens, ids, tokenizer, n_embeddings):
                if (text.edit_index, field) not in reported:
                    reported.add((text.edit_index, field))
                    yield text.edit_index, problem

            edit = edits[text.edit_index] if text.prompt_field == "prompt" else None
            for problem in _text_problems(text, both, edit, tokens, max_positions, template_tokens if edit else 0):
                key = (text.edit_index, str(problem.field))
                if key not in reported:
                    reported.add(key)
                    yield text.edit_index, problem


def beyond(tokenizer: Any, ids: Sequence[int], n_embeddings: int | None) -> str | None:
    """What is wrong with token ids of which one has no row in the embedding; None if all have one."""
    if n_embeddings is None or max(ids, default=0) < n_embeddings:
        return None

    wrong = next(token for token in ids if token >= n_embeddings)

    return (
        f"has the token {tokenizer.convert_ids_to_tokens(wrong)!r} of id {wrong}, for which the model's embedding of"
        f" {n_embeddings} rows has none; leave it out, or call model.resize_token_embeddings(len(tokenizer)) and train"
        " it"
    )


def _unknown_tokens(
    text: _Scored,
    both: Joined,
    tokens: Sequence[tuple[int, int]],
    ids: Sequence[int],
    tokenizer: Any,
    n_embeddings: int | None,
) -> Iterator[tuple[str, Problem]]:
    """(field, problem) for the prompt and the target of a scored text that hold a token without an embedding."""
    if beyond(tokenizer, ids, n_embeddings) is None:
        return

    in_prompt = [token for token, (_, end) in zip(ids, tokens, strict=True) if end <= both.start]
    in_target = [token for token, (_, end) in zip(ids, tokens, strict=True) if end > both.start]
    for field, part in ((text.prompt_field, in_prompt), (text.target_field, in_target)):
        if (message := beyond(tokenizer, part, n_embeddings)) is not None:
            yield field, Problem(message, field)


def _text_problems(
    text: _Scored,
    both: Joined,
    edit: Edit | None,
    tokens: Sequence[tuple[int, int]],
    max_positions: int | None,
    template_tokens: int,
) -> Iterator[Problem]:
    """The problems of one scored text.

    both: prompt and target joined; edit: the edit, if the text comes after its own prompt, which contains the subject
    tokens: (start, end) character offsets of each token of both; (0, 0) for special tokens"""
    target_start = both.start + len(both.text[both.start :]) - len(both.text[both.start :].lstrip())
    parts = {text.target_field: (text.target, target_start, len(both.text))}
    if edit is not None and edit.subject is not None:
        parts["subject"] = (edit.subject, *edit.subject_span)

    for field, (part, start, end) in parts.items():
        if not any(token_start < end and token_end > start for token_start, token_end in tokens):
            yield Problem(f"must give at least one token, got none from {show(part)}", field)

    needed = len(tokens) + template_tokens
    if max_positions is not None and needed > max_positions:
        of_template = f", {template_tokens} of the longest template" if template_tokens else ""
        message = (
            f"must fit into the model's {max_positions} positions, got {needed} tokens "
            f"({len(tokens)} of prompt and target{of_template})"
        )
        yield Problem(message, text.prompt_field)
