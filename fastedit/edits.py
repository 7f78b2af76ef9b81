"""The edit record, sets of them, and every check on them that needs no weights."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple, overload

import pydantic
from pydantic_core import ErrorDetails, PydanticCustomError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one record (or, without line and field, with a whole file)."""

    message: str
    field: str | None = None
    case_id: int | str | None = None
    line: int | None = None
    source: str | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.source, self.line) if part is not None)
        case = "" if self.case_id is None else f"case {self.case_id}"
        field = "" if self.field is None else f"field {self.field!r}"
        return ": ".join(filter(None, (place, ", ".join(filter(None, (case, field))), self.message)))


class InvalidEdits(ValueError):
    """Records that cannot be edited with: `problems` holds all of them, `str` the first 20 and a count."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        lines = [str(problem) for problem in self.problems[:20]]
        if more := len(self.problems) - len(lines):
            lines.append(f"... and {more} more error{'s' if more > 1 else ''}")
        return "\n".join(lines)


def show(value: object) -> str:
    """`repr`, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def case_id_of(record: Mapping[str, Any]) -> int | str | None:
    """The record's case_id if it is one, else None."""
    case_id = record.get("case_id")
    return case_id if isinstance(case_id, int | str) and not isinstance(case_id, bool) else None


Text = Annotated[str, pydantic.StringConstraints(strip_whitespace=True, min_length=1)]


class Probe(NamedTuple):
    """A prompt that an edit must leave alone, with the answer that the data set gives for it, if any."""

    prompt: Text
    answer: Text | None = None


def _checked_case_id(value: object) -> object:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    # It stands in reports and file names: a line break or half a surrogate pair would break those.
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value.strip()
    raise ValueError(f"must be an integer or a printable string, got {show(value)}")


def _as_tuple(value: object) -> object:
    # A Probe is itself a tuple, so it has to be told from a tuple of probes by its type.
    if isinstance(value, str | Probe | Mapping):
        return (value,)
    return () if value is None else tuple(value) if isinstance(value, list) else value


class Edit(pydantic.BaseModel):
    """One fact to write: after `prompt`, in which `subject` stands, the model is to say `target_new`.

    `Edit(prompt="The capital of {} is", subject="France", target_new="Lyon")`: a `{}` in the prompt is
    replaced by the subject, also in `rephrase_prompts` that do not name it. Surrounding whitespace of every
    text is dropped; methods put one space before the target. `rephrase_prompts` takes one string or a list;
    `locality` takes `Probe`s, `(prompt, answer)` pairs or dicts. `case_id=None`: the record is named by its
    position (`assign_case_ids`). Raises `InvalidEdits` naming every wrong or unknown field.
    """

    model_config = pydantic.ConfigDict(frozen=True, strict=True, extra="forbid")

    case_id: Annotated[int | str | None, pydantic.BeforeValidator(_checked_case_id)] = None
    # Before `prompt`, whose check looks for it.
    subject: Text
    prompt: Text
    target_new: Text
    target_true: Text | None = None
    rephrase_prompts: Annotated[tuple[Text, ...], pydantic.BeforeValidator(_as_tuple)] = ()
    locality: Annotated[tuple[Probe, ...], pydantic.BeforeValidator(_as_tuple)] = ()

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except pydantic.ValidationError as error:
            case_id = case_id_of(fields)
            raise InvalidEdits(_problem(detail, case_id) for detail in error.errors()) from None

    @pydantic.field_validator("prompt")
    @classmethod
    def _hold_subject(cls, prompt: str, info: pydantic.ValidationInfo) -> str:
        subject = info.data.get("subject")
        if subject is None:
            return prompt
        # A subject with braces of its own in a finished prompt must not be filled into itself.
        if "{}" not in subject or subject not in prompt:
            prompt = prompt.replace("{}", subject)
        if subject not in prompt:
            raise PydanticCustomError("subject_missing", "{why}", {"why": _why_missing(subject, prompt)})
        return prompt

    @pydantic.field_validator("rephrase_prompts")
    @classmethod
    def _fill_subject(cls, prompts: tuple[str, ...], info: pydantic.ValidationInfo) -> tuple[str, ...]:
        subject = info.data.get("subject", "{}")
        return tuple(text if subject in text else text.replace("{}", subject) for text in prompts)

    @property
    def subject_span(self) -> tuple[int, int]:
        """(start, end) character offsets in `prompt` of the subject's last occurrence, the edited one."""
        start = self.prompt.rindex(self.subject)
        return start, start + len(self.subject)


def _why_missing(subject: str, prompt: str) -> str:
    hint = "write {} where the subject stands"
    if other_case := re.search(re.escape(subject), prompt, re.IGNORECASE):
        hint = f"upper and lower case differ, the prompt has {show(other_case.group())}"
    elif unicodedata.normalize("NFC", subject) in unicodedata.normalize("NFC", prompt):
        hint = "they differ in Unicode normalisation only, write both composed or both decomposed"
    return f"{show(subject)} does not occur in the prompt {show(prompt)}; {hint}"


_WORDINGS = {
    "string_type": "must be a string",
    "string_too_short": "must not be empty",
    "string_unicode": "must be Unicode text without lone surrogates",
    "tuple_type": "must be a list",
    "named_tuple_type": "must be a (prompt, answer) pair",
    # Older releases of pydantic 2 say it in this way.
    "arguments_type": "must be a (prompt, answer) pair",
}


def _problem(detail: ErrorDetails, case_id: int | str | None) -> Problem:
    """One of pydantic's findings about an `Edit`, in this module's words."""
    kind, location = detail["type"], detail["loc"]
    field = str(location[0]) + "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in location[1:])
    wrong = f"{_WORDINGS.get(kind, detail['msg'])}, got {show(detail['input'])}"
    if kind == "subject_missing":
        field, wrong = "subject", detail["msg"]
    elif kind in ("missing", "missing_argument"):
        wrong = "is missing"
    elif kind == "extra_forbidden":
        wrong = unknown(field, Edit.model_fields)
    elif kind == "value_error":
        wrong = str(detail["ctx"]["error"])
    return Problem(wrong, field, case_id)


def unknown(name: str, known: Iterable[str]) -> str:
    """What to say of a field that is none of the known ones."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"is unknown; did you mean {close[0]!r}?" if close else f"is unknown; known are {', '.join(names)}"


@dataclass(frozen=True, repr=False)
class EditSet(Sequence[Edit]):
    """Edits in order, with where they came from; slices are EditSets too.

    `source`: the file as it was named; `form`: the names of its readers, joined by "+"; `lines`: the line on
    which each edit's record begins. None, None and empty for edits that came from no file.
    """

    edits: tuple[Edit, ...]
    source: str | None = None
    form: str | None = None
    lines: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    @overload
    def __getitem__(self, index: int) -> Edit: ...
    @overload
    def __getitem__(self, index: slice) -> EditSet: ...
    def __getitem__(self, index: int | slice) -> Edit | EditSet:
        if isinstance(index, slice):
            return replace(self, edits=self.edits[index], lines=self.lines[index])
        return self.edits[index]

    def __repr__(self) -> str:
        return f"EditSet({len(self)} edits, source={self.source!r}, form={self.form!r})"


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


def assign_case_ids(edits: Iterable[Edit], *, first: int = 0) -> EditSet:
    """Name every edit without a case_id by its position, counted from `first`; the others keep their names.

    Raises `InvalidEdits` if two edits then have one case_id.
    """
    known = edits if isinstance(edits, EditSet) else EditSet(tuple(edits))
    result = replace(known, edits=tuple(named(edit, position) for position, edit in enumerate(known, first)))
    raise_if_any(_repeated_in(result))
    return result


def check_batch(edits: Sequence[Edit]) -> None:
    """Refuse what one batch cannot hold: one (prompt, subject) with two targets, or a case_id used twice.

    Raises `InvalidEdits`. Across batches two targets are fine: the later one wins.
    """
    problems = _repeated_in(edits)
    first: dict[tuple[str, str], int] = {}
    for index, edit in enumerate(edits):
        other = first.setdefault((edit.prompt, edit.subject), index)
        if edits[other].target_new != edit.target_new:
            wrong = (
                f"{show(edit.target_new)} contradicts {_holder(edits, other)}, which wants "
                f"{show(edits[other].target_new)} after the same prompt; put them in different batches"
            )
            problems.append(_placed(Problem(wrong, "target_new"), edits, index))
    raise_if_any(problems)


def check_edits(
    edits: Sequence[Edit],
    *,
    tokenizer: Any = None,
    max_positions: int | None = None,
    template_tokens: int = 0,
) -> None:
    """Check edits given as Python objects and, with a tokenizer, what only it can tell.

    `tokenizer`: a fast transformers tokenizer, since character offsets are needed. The subject and the target
    must each give a token. Prompt, target and special tokens, together with `template_tokens` (those of the
    longest context template), must fit into `max_positions`. Raises `InvalidEdits` with all problems,
    `TypeError` for a slow tokenizer, `ValueError` for `max_positions` without a tokenizer.
    """
    if tokenizer is None and max_positions is not None:
        raise ValueError(f"check_edits: max_positions={max_positions} needs a tokenizer, got None")
    if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"check_edits: tokenizer must be a fast one, got {type(tokenizer).__name__}")
    problems = _repeated_in(edits)
    sound: list[int] = []
    for index, edit in enumerate(edits):
        found = _object_problems(edit)
        problems += [_placed(problem, edits, index) for problem in found]
        if not found:
            sound.append(index)
    for begin in range(0, len(sound) if tokenizer is not None else 0, 1024):
        group = sound[begin : begin + 1024]
        texts = [f"{edits[index].prompt} {edits[index].target_new}" for index in group]
        spans = tokenizer(texts, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        for index, tokens in zip(group, spans, strict=True):
            found = _token_problems(edits[index], tokens, max_positions, template_tokens)
            problems += [_placed(problem, edits, index) for problem in found]
    raise_if_any(problems)


def _object_problems(edit: object) -> Sequence[Problem]:
    if not isinstance(edit, Edit):
        return [Problem(f"must be an Edit, got {show(edit)}")]
    try:
        # `model_copy(update=...)` changes fields without a check.
        Edit(**dict(edit))
    except InvalidEdits as error:
        return error.problems
    return []


def _token_problems(
    edit: Edit, tokens: Sequence[tuple[int, int]], max_positions: int | None, template_tokens: int
) -> list[Problem]:
    """`tokens`: the character offsets of each token of "prompt target"; special tokens have (0, 0)."""
    target_at = len(edit.prompt) + 1
    places = {"subject": edit.subject_span, "target_new": (target_at, target_at + len(edit.target_new))}
    problems = [
        Problem(f"must give at least one token, got none from {show(getattr(edit, field))}", field)
        for field, (start, end) in places.items()
        if not any(token_start < end and token_end > start for token_start, token_end in tokens)
    ]
    needed = len(tokens) + template_tokens
    if max_positions is not None and needed > max_positions:
        wrong = (
            f"must fit into the model's {max_positions} positions, got {needed} tokens "
            f"({len(tokens)} of prompt and target, {template_tokens} of the longest template)"
        )
        problems.append(Problem(wrong, "prompt"))
    return problems


def _repeated_in(edits: Sequence[Edit]) -> list[Problem]:
    holders: dict[str, str] = {}
    problems: list[Problem] = []
    for index, edit in enumerate(edits):
        found = repeated(holders, getattr(edit, "case_id", None), _holder(edits, index))
        problems += [_placed(problem, edits, index) for problem in found]
    return problems


def _holder(edits: Sequence[Edit], index: int) -> str:
    case_id = getattr(edits[index], "case_id", None)
    place = _placed(Problem(""), edits, index)
    at = place.source if place.line is None else f"line {place.line}"
    return f"the record on {at}" if case_id is None else f"case {case_id} ({at})"


def _placed(problem: Problem, edits: Sequence[Edit], index: int) -> Problem:
    case_id = getattr(edits[index], "case_id", None)
    if isinstance(edits, EditSet) and edits.lines:
        return replace(problem, case_id=case_id, line=edits.lines[index], source=edits.source)
    return replace(problem, case_id=case_id, source=f"edits[{index}]")


def raise_if_any(problems: Sequence[Problem]) -> None:
    """Raise `InvalidEdits` unless there are no problems."""
    if problems:
        raise InvalidEdits(problems)
