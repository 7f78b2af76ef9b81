"""The edit record, sets of edits, and the problems that a record can have."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple, ParamSpec, TypeAlias, overload

import pydantic
from pydantic_core import ErrorDetails, PydanticCustomError

from fastedit.records.subjects import fill, near_miss, places_of, slot_of, stands_in

# None until a file or an editor has numbered the records.
CaseId: TypeAlias = int | str | None


@dataclass(frozen=True)
class Problem:
    """One problem of a record, or of a whole file if it has no line and no field.

    field: where it is in the record, such as `locality[2].prompt`; line, source: where the record begins
    `str` gives one line with all of them.
    """

    message: str
    field: str | None = None
    case_id: CaseId = None
    line: int | None = None
    source: str | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.source, self.line) if part is not None)
        case = "" if self.case_id is None else f"case {_printable(self.case_id)}"
        field = "" if self.field is None else f"field {self.field!r}"
        case_and_field = ", ".join(filter(None, (case, field)))

        return ": ".join(filter(None, (place, case_and_field, self.message)))


def _printable(case_id: int | str) -> str:
    """A case_id for a message. One that is not checked yet may hold line breaks, or be very long."""
    text = str(case_id)

    return text if text.isprintable() and len(text) <= 60 else show(case_id)


def listing(problems: Sequence[Problem]) -> str:
    """One line for each of the first 20 problems, and the number of the others."""
    lines = [str(problem) for problem in problems[:20]]

    if more := len(problems) - len(lines):
        lines.append(f"... and {more} more error{'s' if more > 1 else ''}")

    return "\n".join(lines)


class InvalidEdits(ValueError):
    """Records that cannot be used.

    problems: all of them; `str` gives the first 20 and the number of the others
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return listing(self.problems)


def show(value: object) -> str:
    """`repr`, cut to 60 characters."""
    text = repr(value)

    return text if len(text) <= 60 else f"{text[:57]}..."


def case_id_of(record: Mapping[str, Any]) -> CaseId:
    """The record's case_id if it is an integer or a string, else None."""
    case_id = record.get("case_id")

    return case_id if isinstance(case_id, int | str) and not isinstance(case_id, bool) else None


def _as_tuple(value: object) -> object:
    """A tuple of one string, of a list, or of None; other values are left to the check that follows."""
    if value is None:
        return ()

    if isinstance(value, str):
        return (value,)

    return tuple(value) if isinstance(value, list) else value


def _not_blank(text: str) -> str:
    """The text as it is. Raises unless it holds something besides white space."""
    if not text.strip():
        raise PydanticCustomError("string_too_short", "must not be empty")

    return text


# A name, without outer white space.
Name = Annotated[str, pydantic.StringConstraints(strip_whitespace=True, min_length=1)]
# A text that the model reads, with the outer white space that it was written with.
# The constraint refuses lone surrogates.
Text = Annotated[str, pydantic.StringConstraints(min_length=1), pydantic.AfterValidator(_not_blank)]
Texts = Annotated[tuple[Text, ...], pydantic.BeforeValidator(_as_tuple)]


class Probe(NamedTuple):
    """A question that measures a side effect of an edit.

    prompt: the question; answers: the right answers, each of which counts
    group: the group in whose score it is counted

    In an `Edit`, `answers` may be a single string, and a probe without a group gets the default group.
    """

    prompt: Text
    answers: Texts = ()
    group: Name | None = None

    @property
    def answer(self) -> str | None:
        """The first of the answers, or None."""
        return self.answers[0] if self.answers else None


# How probes may be written in `Edit(...)`.
Answers = str | Sequence[str] | None
ProbeLike = Probe | tuple[str, Answers] | tuple[str, Answers, str | None] | Mapping[str, Any]
ProbesLike = ProbeLike | Sequence[ProbeLike] | Mapping[str, ProbeLike | Sequence[ProbeLike] | None] | None


def _probe_fields(value: object, group: str) -> object:
    """The fields of a `Probe` by name, in `group` unless it has one of its own; a wrong value as it is."""
    if isinstance(value, list | tuple) and 1 <= len(value) <= len(Probe._fields):
        value = dict(zip(Probe._fields, value, strict=False))

    if not isinstance(value, Mapping):
        return value

    return {**value, "group": group if value.get("group") is None else value["group"]}


def _probes_of_group(value: object, group: str) -> object:
    """A tuple of probes in `group`, from a single probe or a sequence of them; a wrong value as it is."""
    if value is None:
        return ()

    # No sequence of probes begins with a string, so this is a single (prompt, answers) pair.
    is_pair = isinstance(value, list | tuple) and bool(value) and isinstance(value[0], str)
    if is_pair or isinstance(value, Mapping):
        return (_probe_fields(value, group),)

    return tuple(_probe_fields(probe, group) for probe in value) if isinstance(value, list | tuple) else value


def _probes(default_group: str) -> Callable[[object], object]:
    """A validator that turns `ProbesLike` into one tuple of probes."""

    def validate(value: object) -> object:
        if not isinstance(value, Mapping) or "prompt" in value:
            return _probes_of_group(value, default_group)

        probes: list[object] = []
        for group, members in value.items():
            of_group = _probes_of_group(members, str(group))
            probes += of_group if isinstance(of_group, tuple) else (of_group,)

        return tuple(probes)

    return validate


def _checked_case_id(value: object) -> object:
    """The case_id without surrounding whitespace. Raises ValueError unless it is an integer, a string or None."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value

    # It is part of reports and file names, which a line break or half a surrogate pair would break.
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value.strip()

    raise ValueError(f"must be an integer or a printable string, got {show(value)}")


P = ParamSpec("P")


def _raising_invalid_edits(signature: Callable[P, None]) -> Callable[P, None]:
    """An `__init__` with the given signature that lets pydantic check the fields and raises its errors in our words.

    It takes whatever it is given, so that missing and unknown fields are reported with all other problems."""

    @functools.wraps(signature)
    def init(self: pydantic.BaseModel, /, **fields: Any) -> None:
        try:
            pydantic.BaseModel.__init__(self, **fields)
        except pydantic.ValidationError as error:
            case_id = case_id_of(fields)
            raise InvalidEdits(_problem(detail, case_id) for detail in error.errors()) from None

    return init  # type: ignore[return-value]


class Edit(pydantic.BaseModel):
    """One fact to write: after `prompt`, which contains `subject`, the model shall say `target_new`.

    `Edit(prompt="The capital of {} is", subject="France", target_new="Lyon")`: a `{}` in the prompt is replaced by the
    subject, which is edited there. So is one in a rephrase or generation prompt that does not name the subject. Prompts
    and targets keep their outer white space.

    subject: None if the record has none, for methods that read no subject (`Method.needs_subject`)
    subject_at: the character of `prompt` at which the subject begins that is edited; None = where the last `{}` was,
        else the last place at which the subject stands as a whole word
    join: what to put between every prompt and target of the record, exactly; None = what :mod:`.join` says: a space,
        but none where there is white space already, and none where nobody would write one
    target_true: what the model said before the edit, if it is known
    rephrase_prompts: other wordings of the prompt, one string or a list
    generation_prompts: beginnings of texts about the subject, for fluency; without any, the prompt is used
    locality: questions whose answers must not change; portability: questions whose answers must follow the edit.
        Both take one probe or a list of them. A probe is (prompt, answer), (prompt, [answer, alias]),
        (prompt, answers, group), a `Probe` or a dict. A dict of group names holds the probes of each group:
        `portability={"one hop": [("The river of Lyon is", ["Rhône", "Saône"])]}`.
        The default groups are "neighborhood" and "portability".
    case_id: the name of the edit in reports; None = its position in the file or list

    Raises `InvalidEdits`, which names every wrong or unknown field.
    """

    model_config = pydantic.ConfigDict(frozen=True, strict=True, extra="forbid")

    # Edits are recorded and hashed in run directories: see fastedit.runs.fields before you add or remove a field, here
    # or in `Probe`.
    case_id: Annotated[CaseId, pydantic.BeforeValidator(_checked_case_id)] = None
    # Before `prompt`, because the check of the prompt looks for the subject.
    subject: Name | None = None
    prompt: Text
    target_new: Text
    target_true: Text | None = None
    rephrase_prompts: Texts = ()
    generation_prompts: Texts = ()
    locality: Annotated[tuple[Probe, ...], pydantic.BeforeValidator(_probes("neighborhood"))] = ()
    portability: Annotated[tuple[Probe, ...], pydantic.BeforeValidator(_probes("portability"))] = ()
    subject_at: int | None = pydantic.Field(None, json_schema_extra={"before": None})
    join: Annotated[str, pydantic.StringConstraints(min_length=0)] | None = pydantic.Field(
        None, json_schema_extra={"before": None}
    )

    @_raising_invalid_edits
    def __init__(
        self,
        *,
        prompt: str,
        subject: str | None = None,
        target_new: str,
        target_true: str | None = None,
        rephrase_prompts: str | Sequence[str] | None = (),
        generation_prompts: str | Sequence[str] | None = (),
        locality: ProbesLike = (),
        portability: ProbesLike = (),
        case_id: CaseId = None,
        subject_at: int | None = None,
        join: str | None = None,
    ) -> None:
        """See the class."""

    def __repr__(self) -> str:
        parts = [] if self.case_id is None else [f"case_id={self.case_id!r}"]
        parts += [f"prompt={self.prompt!r}", f"subject={self.subject!r}", f"target_new={self.target_new!r}"]
        for name in ("target_true", "subject_at", "join"):
            if getattr(self, name) is not None:
                parts.append(f"{name}={getattr(self, name)!r}")

        for name in ("rephrase_prompts", "generation_prompts", "locality", "portability"):
            if members := getattr(self, name):
                parts.append(f"{name}=<{len(members)}>")

        return f"Edit({', '.join(parts)})"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_slot(cls, data: Any) -> Any:
        """Put the subject into the prompt, and keep the place of the slot where it is not the one that is looked up."""
        prompt, subject = data.get("prompt"), data.get("subject")
        if not isinstance(prompt, str) or not isinstance(subject, str) or data.get("subject_at") is not None:
            return data

        subject = subject.strip()
        slot = slot_of(prompt, subject)
        if slot is None or not subject:
            return data

        filled = fill(prompt, subject)
        at = None if places_of(subject, filled)[-1] == slot else slot

        return {**data, "prompt": filled, "subject_at": at}

    @pydantic.field_validator("prompt")
    @classmethod
    def _has_subject(cls, prompt: str, info: pydantic.ValidationInfo) -> str:
        if "subject" not in info.data:
            return prompt

        subject = info.data["subject"]
        if subject is None and "{}" in prompt:
            message = f"is missing, and the prompt {show(prompt)} has a {{}} for it"
            raise PydanticCustomError("subject_missing", "{why}", {"why": message})
        if subject is not None and subject not in prompt:
            raise PydanticCustomError("subject_missing", "{why}", {"why": _why_missing(subject, prompt)})

        return prompt

    @pydantic.field_validator("subject_at")
    @classmethod
    def _at_subject(cls, at: int | None, info: pydantic.ValidationInfo) -> int | None:
        subject, prompt = info.data.get("subject"), info.data.get("prompt")
        if at is None or prompt is None:
            return at

        if subject is None or at < 0 or not prompt.startswith(subject, at):
            raise ValueError(f"must be the character of the prompt at which the subject begins, got {at}")

        return at

    @pydantic.field_validator("rephrase_prompts", "generation_prompts")
    @classmethod
    def _put_subject_into_others(cls, prompts: tuple[str, ...], info: pydantic.ValidationInfo) -> tuple[str, ...]:
        subject = info.data.get("subject")
        if subject is None:
            return prompts

        return tuple(text if stands_in(subject, text) else fill(text, subject) for text in prompts)

    @property
    def subject_span(self) -> tuple[int, int]:
        """(start, end) character offsets in `prompt` of the subject that is edited. Raises ValueError without one."""
        if self.subject is None:
            raise ValueError(f"case {self.case_id}: no subject")

        start = self.subject_at
        if start is None:
            places = places_of(self.subject, self.prompt)
            if not places:
                raise ValueError(f"case {self.case_id}: {_why_missing(self.subject, self.prompt)}")
            start = places[-1]

        return start, start + len(self.subject)


class LocatedEdit(Edit):
    """An edit that has a subject."""

    subject: Name


def _why_missing(subject: str, prompt: str) -> str:
    """The message for a prompt without its subject, with a hint at the likely cause."""
    hint = near_miss(subject, prompt) or "write {} where the subject stands"

    return f"{show(subject)} does not occur in the prompt {show(prompt)}, where it is edited; {hint}"


NO_SUBJECT = "is missing; methods that locate a fact before they edit it need the subject, as it stands in the prompt"

# Type of pydantic's error -> our message.
_WORDINGS = {
    "string_type": "must be a string",
    "string_too_short": "must not be empty",
    "string_unicode": "must be Unicode text without lone surrogates",
    "tuple_type": "must be a list",
    "named_tuple_type": "must be a (prompt, answer) pair",
    "too_long": "must be a (prompt, answer) pair",
    # Names of the same errors in older releases of pydantic 2.
    "arguments_type": "must be a (prompt, answer) pair",
    "unexpected_positional_argument": "must be a (prompt, answer) pair",
}


def _problem(detail: ErrorDetails, case_id: CaseId) -> Problem:
    """One of pydantic's errors about an `Edit`, in our words."""
    kind = detail["type"]
    location = detail["loc"]
    field = str(location[0]) + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location[1:])
    message = f"{_WORDINGS.get(kind, detail['msg'])}, got {show(detail['input'])}"

    if kind == "subject_missing":
        field = "subject"
        message = detail["msg"]
    elif kind in ("missing", "missing_argument"):
        message = NO_SUBJECT if field == "subject" else "is missing"
    elif kind in ("extra_forbidden", "unexpected_keyword_argument"):
        message = unknown_field(str(location[-1]), Edit.model_fields if len(location) == 1 else Probe._fields)
    elif kind == "value_error":
        message = str(detail["ctx"]["error"])

    return Problem(message, field, case_id)


def unknown_field(name: str, known: Iterable[str]) -> str:
    """The message for a field that is not one of the known ones, with the closest of them or all."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)

    return f"is unknown; did you mean {close[0]!r}?" if close else f"is unknown; known are {', '.join(names)}"


@dataclass(frozen=True, repr=False)
class EditSet(Sequence[Edit]):
    """Edits in order, and where they came from. A slice is an EditSet too.

    source: the path of the file, as it was given
    form: the names of the forms of its records, joined by "+"
    target_field: for each form the field of the record that became `target_new`, joined by "+"
    lines: for each edit, the line on which its record begins
    skipped: the problems of records that were left out; empty in a slice
    ignored: names of fields that the forms do not use
    All but `edits` are None or empty for edits that were not read from a file.
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
        """One line: the number of edits, their form, the field that became the target, and the fields ignored."""
        line = f"read {len(self)} edit{'s' * (len(self) != 1)}"

        if self.form is not None:
            line += f": form {self.form}, target = {self.target_field}"

        return line + (f", ignored fields: {', '.join(self.ignored)}" if self.ignored else "")
