"""The edit record, sets of them, and how what is wrong with one is told."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        case = "" if self.case_id is None else f"case {_named(self.case_id)}"
        field = "" if self.field is None else f"field {self.field!r}"
        return ": ".join(filter(None, (place, ", ".join(filter(None, (case, field))), self.message)))


def _named(case_id: int | str) -> str:
    """A case id as it may stand in a message: one that was not checked yet may be anything."""
    text = str(case_id)
    return text if text.isprintable() and len(text) <= 60 else show(case_id)


def listing(problems: Sequence[Problem]) -> str:
    """One line for each of the first 20 problems, and a count of the others."""
    lines = [str(problem) for problem in problems[:20]]
    if more := len(problems) - len(lines):
        lines.append(f"... and {more} more error{'s' if more > 1 else ''}")
    return "\n".join(lines)


class InvalidEdits(ValueError):
    """Records that cannot be edited with: `problems` holds all of them, `str` the first 20 and a count."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return listing(self.problems)


def show(value: object) -> str:
    """`repr`, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def case_id_of(record: Mapping[str, Any]) -> int | str | None:
    """The record's case_id if it is one, else None."""
    case_id = record.get("case_id")
    return case_id if isinstance(case_id, int | str) and not isinstance(case_id, bool) else None


def _as_tuple(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return () if value is None else tuple(value) if isinstance(value, list) else value


Text = Annotated[str, pydantic.StringConstraints(strip_whitespace=True, min_length=1)]
Texts = Annotated[tuple[Text, ...], pydantic.BeforeValidator(_as_tuple)]


class Probe(NamedTuple):
    """A question beside the edit itself: a prompt, the answers of which each is right, and the group it counts in.

    In an `Edit`, `answers` may be written as one string, and a probe without a group gets the default one.
    """

    prompt: Text
    answers: Texts = ()
    group: Text | None = None

    @property
    def answer(self) -> str | None:
        """The first of the answers, or None."""
        return self.answers[0] if self.answers else None


def _probes(default_group: str) -> Callable[[object], object]:
    """Makes one tuple of probes of all the ways in which they may be written by hand."""

    def one(value: object, group: str) -> object:
        if isinstance(value, list | tuple) and 1 <= len(value) <= len(Probe._fields):
            value = dict(zip(Probe._fields, value, strict=False))
        if not isinstance(value, Mapping):
            return value
        return {**value, "group": group if value.get("group") is None else value["group"]}

    def several(value: object, group: str) -> object:
        if value is None:
            return ()
        # No sequence of probes begins with a string: this is a single (prompt, answers) pair.
        if isinstance(value, Mapping) or (isinstance(value, list | tuple) and value and isinstance(value[0], str)):
            return (one(value, group),)
        return tuple(one(each, group) for each in value) if isinstance(value, list | tuple) else value

    def flat(value: object) -> object:
        if not isinstance(value, Mapping) or "prompt" in value:
            return several(value, default_group)
        groups = [several(members, str(name)) for name, members in value.items()]
        return tuple(probe for group in groups for probe in (group if isinstance(group, tuple) else (group,)))

    return flat


def _checked_case_id(value: object) -> object:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    # It stands in reports and file names: a line break or half a surrogate pair would break those.
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value.strip()
    raise ValueError(f"must be an integer or a printable string, got {show(value)}")


class Edit(pydantic.BaseModel):
    """One fact to write: after `prompt`, in which `subject` stands, the model is to say `target_new`.

    `Edit(prompt="The capital of {} is", subject="France", target_new="Lyon")`: a `{}` in the prompt is
    replaced by the subject, also in `rephrase_prompts` and `generation_prompts` that do not name it.
    Surrounding whitespace of every text is dropped; methods put one space before the target.

    target_true: what the model said before, as far as it is known
    rephrase_prompts: other words for the prompt, one string or a list
    generation_prompts: beginnings of texts about the subject, for fluency; the prompt where there are none
    locality: what must stay as it is; portability: what must change with the edit. Both take one probe or a
        list of them, written as (prompt, answer), (prompt, [answer, alias]), (prompt, answers, group), `Probe` or
        dict, or a dict of group names: `portability={"one hop": [("The river of Lyon is", ["Rhône", "Saône"])]}`.
        Groups default to "neighborhood" and "portability".
    case_id: None = the record is named by its position

    Raises `InvalidEdits` naming every wrong or unknown field.
    """

    model_config = pydantic.ConfigDict(frozen=True, strict=True, extra="forbid")

    # Edits are recorded and hashed in run directories: see fastedit.runs.fields before you add or remove a field, here
    # or in `Probe`.
    case_id: Annotated[int | str | None, pydantic.BeforeValidator(_checked_case_id)] = None
    # Before `prompt`, whose check looks for it.
    subject: Text
    prompt: Text
    target_new: Text
    target_true: Text | None = None
    rephrase_prompts: Texts = ()
    generation_prompts: Texts = ()
    locality: Annotated[tuple[Probe, ...], pydantic.BeforeValidator(_probes("neighborhood"))] = ()
    portability: Annotated[tuple[Probe, ...], pydantic.BeforeValidator(_probes("portability"))] = ()

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

    @pydantic.field_validator("rephrase_prompts", "generation_prompts")
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
    return f"{show(subject)} does not occur in the prompt {show(prompt)}, where it is edited; {hint}"


_WORDINGS = {
    "string_type": "must be a string",
    "string_too_short": "must not be empty",
    "string_unicode": "must be Unicode text without lone surrogates",
    "tuple_type": "must be a list",
    "named_tuple_type": "must be a (prompt, answer) pair",
    "too_long": "must be a (prompt, answer) pair",
    # Older releases of pydantic 2 say these in another way.
    "arguments_type": "must be a (prompt, answer) pair",
    "unexpected_positional_argument": "must be a (prompt, answer) pair",
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
        if field == "subject":
            wrong += "; methods that locate a fact before they edit it need the subject, as it stands in the prompt"
    elif kind in ("extra_forbidden", "unexpected_keyword_argument"):
        wrong = unknown(str(location[-1]), Edit.model_fields if len(location) == 1 else Probe._fields)
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

    source: the file as it was named
    form, target_field: the names of the forms its records have, joined by "+", and for each the field of the
        record that became `target_new`
    lines: the line on which each edit's record begins
    skipped: what was wrong with the records that were left out; a slice tells of none
    ignored: names of fields that the forms have no use for
    None and empty for edits that came from no file.
    """

    edits: tuple[Edit, ...]
    source: str | None = None
    form: str | None = None
    lines: tuple[int, ...] = ()
    target_field: str | None = None
    skipped: tuple[Problem, ...] = ()
    ignored: tuple[str, ...] = ()

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
            return replace(self, edits=self.edits[index], lines=self.lines[index], skipped=())
        return self.edits[index]

    def __repr__(self) -> str:
        return f"EditSet({len(self)} edits, source={self.source!r}, form={self.form!r})"

    def describe(self) -> str:
        """One line: how many edits were read, in which form, which field became the target, what was ignored."""
        line = f"read {len(self)} edit{'s' * (len(self) != 1)}"
        if self.form is not None:
            line += f": form {self.form}, target = {self.target_field}"
        return line + (f", ignored fields: {', '.join(self.ignored)}" if self.ignored else "")
