"""Drafts of edits: each field is taken from a place in a record, and a problem with it names that place."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastedit.records.edit import Edit, InvalidEdits, LocatedEdit, Problem, show

Record = Mapping[str, Any]
# A place in a record, as names of fields and positions in lists: ("requested_rewrite", "target_new", "str").
Path = tuple[str | int, ...]

_ABSENT: Any = object()


@dataclass(frozen=True)
class Question:
    """The places of the parts of a `Probe` in a record.

    prompt: the place of its prompt; answers: places of right answers, or of lists of them; group: its group
    """

    prompt: Path
    answers: tuple[Path, ...]
    group: str | None = None


def dotted(path: Path) -> str:
    """A place as text: `requested_rewrite.target_new.str`, `neighborhood_prompts[2]`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def is_blank(value: Any) -> bool:
    """Whether a field is empty: null, whitespace, or the NaN that tables have for an empty cell."""
    if isinstance(value, str):
        return not value.strip()

    return value is None or (isinstance(value, float) and math.isnan(value))


@dataclass
class Draft:
    """Collects the fields of one `Edit` from a record.

    lenient: whether an optional field that is blank counts as absent. Otherwise only null does, and other blank values
        are problems
    trimmed: whether outer white space of the texts is dropped, which published data sets have by accident
    needs_subject: whether every record of the form has a subject
    """

    record: Record
    lenient: bool = False
    trimmed: bool = False
    needs_subject: bool = False
    _values: dict[str, Any] = field(default_factory=dict)
    # Field of the edit -> its place in the record, both as text.
    _places: dict[str, str] = field(default_factory=dict)
    _problems: list[Problem] = field(default_factory=list)

    def take(self, fields: Mapping[str, Path]) -> None:
        """Fill fields of the edit, given as name -> place. A field whose place is absent is left out."""
        for name, path in fields.items():
            value = self._value_at(path, optional=not self._kind.model_fields[name].is_required())

            self._places[name] = dotted(path)
            if isinstance(value, list):
                self._places.update({f"{name}[{i}]": dotted((*path, i)) for i in range(len(value))})
            if value is not _ABSENT:
                self._values[name] = [*map(self._trim, value)] if isinstance(value, list) else self._trim(value)

    def take_probes(self, name: str, questions: Iterable[Question]) -> None:
        """Fill `locality` or `portability`. A question whose prompt and answers are all absent is left out."""
        probes: list[dict[str, Any]] = []

        for question in questions:
            probe = f"{name}[{len(probes)}]"
            answers: list[Any] = []
            for path in question.answers:
                for answer in map(self._trim, self._leaves(self._value_at(path))):
                    if answer not in answers:
                        self._places[f"{probe}.answers[{len(answers)}]"] = dotted(path)
                        answers.append(answer)

            prompt = self._trim(self._value_at(question.prompt))
            if prompt is _ABSENT and not answers:
                continue

            self._places[f"{probe}.prompt"] = dotted(question.prompt)
            prompt_field = {} if prompt is _ABSENT else {"prompt": prompt}
            probes.append({**prompt_field, "answers": answers, "group": question.group})

        self._values[name] = probes

    def entries(self, *path: str | int) -> range:
        """The positions of a list in the record. Empty if it is absent; another value is a problem."""
        value = self._value_at(path)

        if isinstance(value, list):
            return range(len(value))

        if value is not _ABSENT:
            self.add_problem(f"must be a list, got {show(value)}", path)

        return range(0)

    def add_problem(self, message: str, path: Path) -> None:
        """Add a problem at a place in the record."""
        self._problems.append(Problem(message, dotted(path)))

    def edit(self) -> Edit:
        """The edit. Raises `InvalidEdits` with all problems; their fields are places in the record."""
        edit = None
        problems = list(self._problems)
        # A value of the wrong type lacks all that it should contain, which is no problem of its own.
        inside_wrong = tuple(f"{problem.field}{mark}" for problem in problems for mark in ".[")

        try:
            edit = Edit(**dict(self._kind(**self._values)))
        except InvalidEdits as error:
            at_places = [replace(problem, field=self._place(str(problem.field))) for problem in error.problems]
            problems += [problem for problem in at_places if not str(problem.field).startswith(inside_wrong)]

        if edit is None or problems:
            # Without repeats, because one field of the record can fill several fields of the edit.
            raise InvalidEdits(dict.fromkeys(problems))

        return edit

    @property
    def _kind(self) -> type[Edit]:
        """The class whose fields the record must fill."""
        return LocatedEdit if self.needs_subject else Edit

    def _value_at(self, path: Path, optional: bool = True) -> Any:
        """The value at a place, _ABSENT if there is none or if it is optional and counts as absent.

        A value of the wrong type on the way to it is added as a problem."""
        value: Any = self.record

        for depth, step in enumerate(path):
            if value is None or value is _ABSENT:
                return _ABSENT
            if isinstance(step, str) and isinstance(value, dict):
                value = value.get(step, _ABSENT)
            elif isinstance(step, int) and isinstance(value, list):
                value = value[step] if step < len(value) else _ABSENT
            else:
                kind = "an object" if isinstance(step, str) else "a list"
                self.add_problem(f"must be {kind}, got {show(value)}", path[:depth])
                return _ABSENT

        counts_as_absent = optional and (value is None or (self.lenient and is_blank(value)))

        return _ABSENT if counts_as_absent else value

    def _trim(self, value: Any) -> Any:
        """A text without outer white space if the draft is trimmed; any other value, and a blank text, as it is."""
        return value.strip() if self.trimmed and isinstance(value, str) and value.strip() else value

    def _leaves(self, value: Any) -> Iterator[Any]:
        """The values in nested lists, in order. Some records list several answers, each in several spellings."""
        if isinstance(value, list):
            for member in value:
                yield from self._leaves(member)
        elif value is not _ABSENT and value is not None and not (self.lenient and is_blank(value)):
            yield value

    def _place(self, name: str) -> str:
        """The place in the record of a field of the edit, such as `locality[2].answers[0]`."""
        return self._places.get(name) or self._places.get(re.sub(r"\[\d+\]$", "", name), name)
