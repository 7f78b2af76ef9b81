"""Edits drafted from records: every field is taken from its place in the record, and told by it when it is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastedit.records.edit import Edit, InvalidEdits, Problem, show

Record = Mapping[str, Any]
# Names of fields and positions in lists: ("requested_rewrite", "target_new", "str").
Path = tuple[str | int, ...]

_ABSENT: Any = object()


@dataclass(frozen=True)
class Question:
    """Where the parts of a `Probe` stand in a record; what stands in any of the answers' places is right."""

    prompt: Path
    answers: tuple[Path, ...]
    group: str | None = None


def spelt(path: Path) -> str:
    """requested_rewrite.target_new.str, neighborhood_prompts[2]"""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def is_blank(value: Any) -> bool:
    """Whether there is nothing in a field: null, white space, or the NaN that tables have for an empty cell."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


@dataclass
class Draft:
    """Collects the fields of one `Edit` from a record.

    lenient: an optional field that is blank is absent, instead of wrong; null is absent in either case
    """

    record: Record
    lenient: bool = False
    _values: dict[str, Any] = field(default_factory=dict)
    _places: dict[str, str] = field(default_factory=dict)
    _problems: list[Problem] = field(default_factory=list)

    def take(self, fields: Mapping[str, Path]) -> None:
        """Fill fields of the edit from places in the record; a place that is not there leaves its field out."""
        for name, path in fields.items():
            value = self._look(path, optional=not Edit.model_fields[name].is_required())
            self._places[name] = spelt(path)
            if isinstance(value, list):
                self._places.update({f"{name}[{i}]": spelt((*path, i)) for i in range(len(value))})
            if value is not _ABSENT:
                self._values[name] = value

    def ask(self, name: str, questions: Iterable[Question]) -> None:
        """Fill `locality` or `portability`; a question with neither prompt nor answer is left out."""
        probes: list[dict[str, Any]] = []
        for question in questions:
            at = f"{name}[{len(probes)}]"
            answers: list[Any] = []
            for path in question.answers:
                for answer in self._leaves(self._look(path)):
                    if answer not in answers:
                        self._places[f"{at}.answers[{len(answers)}]"] = spelt(path)
                        answers.append(answer)
            prompt = self._look(question.prompt)
            if prompt is _ABSENT and not answers:
                continue
            self._places[f"{at}.prompt"] = spelt(question.prompt)
            given = {} if prompt is _ABSENT else {"prompt": prompt}
            probes.append({**given, "answers": answers, "group": question.group})
        self._values[name] = probes

    def entries(self, *path: str | int) -> range:
        """The positions in a list of the record; none if it is absent, a problem if it is something else."""
        value = self._look(path)
        if isinstance(value, list):
            return range(len(value))
        if value is not _ABSENT:
            self.blame(f"must be a list, got {show(value)}", path)
        return range(0)

    def blame(self, wrong: str, path: Path) -> None:
        """Note a problem of the record."""
        self._problems.append(Problem(wrong, spelt(path)))

    def edit(self) -> Edit:
        """The edit. Raises `InvalidEdits` with all problems, whose fields are places in the record."""
        edit, problems = None, list(self._problems)
        broken = tuple(f"{problem.field}{mark}" for problem in problems for mark in ".[")
        try:
            edit = Edit(**self._values)
        except InvalidEdits as error:
            told = [replace(problem, field=self._place(str(problem.field))) for problem in error.problems]
            # What should stand inside something of another type is missing too, which is the same fault.
            problems += [problem for problem in told if not str(problem.field).startswith(broken)]
        if edit is None or problems:
            # One field of the record can fill several of the edit.
            raise InvalidEdits(dict.fromkeys(problems))
        return edit

    def _look(self, path: Path, optional: bool = True) -> Any:
        value: Any = self.record
        for depth, step in enumerate(path):
            if value is None or value is _ABSENT:
                return _ABSENT
            if isinstance(step, str) and isinstance(value, dict):
                value = value.get(step, _ABSENT)
            elif isinstance(step, int) and isinstance(value, list):
                value = value[step] if step < len(value) else _ABSENT
            else:
                wanted = "an object" if isinstance(step, str) else "a list"
                self.blame(f"must be {wanted}, got {show(value)}", path[:depth])
                return _ABSENT
        absent = optional and (value is None or (self.lenient and is_blank(value)))
        return _ABSENT if absent else value

    def _leaves(self, value: Any) -> Iterator[Any]:
        """What stands in nested lists, which say: one of several answers, each in one of several spellings."""
        if isinstance(value, list):
            for each in value:
                yield from self._leaves(each)
        elif value is not _ABSENT and value is not None and not (self.lenient and is_blank(value)):
            yield value

    def _place(self, name: str) -> str:
        """The place of a field of the edit, say of `locality[2].answers[0]`."""
        return self._places.get(name) or self._places.get(re.sub(r"\[\d+\]$", "", name), name)
