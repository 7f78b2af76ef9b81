"""Edits from data files: the decoding of a file, which form a record has, and where it went wrong.

A file is judged as a whole: all its problems are raised together as one `InvalidEdits`. What the forms of record are
is known to `forms`.
"""

from __future__ import annotations

import codecs
import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastedit.records.check import check_on_invalid, named, repeated
from fastedit.records.edit import Edit, EditSet, InvalidEdits, Problem, case_id_of, show, unknown_field
from fastedit.records.forms import READERS, Reader

# How alike a name must be to a known one to be taken for it: `rephrse` is, `subject_id` is not.
MISSPELT = 0.85


def _records(source: str) -> Iterator[tuple[int, Any]]:
    """(line, record) for each record of the file, a `Problem` in place of a record that cannot be decoded.

    Raises `InvalidEdits` where nothing after the fault can be read.
    """
    suffix = os.path.splitext(source)[1].lower()
    wrong, data = "", b""
    try:
        with open(source, "rb") as file:
            data = file.read().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        wrong = "no such file"
    except OSError as error:
        wrong = "is a folder" if os.path.isdir(source) else f"cannot be read: {error.strerror}"
    else:
        if suffix not in (".jsonl", ".json"):
            wrong = f"must be a .jsonl or .json file, got {suffix or 'no suffix'}"
        elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            wrong = "must be UTF-8, got UTF-16"
        elif not data.strip():
            wrong = "is empty"
    if wrong:
        raise InvalidEdits([Problem(wrong)])
    yield from _json_lines(data) if suffix == ".jsonl" else _json_list(data)


def _object(pairs: list[tuple[str, Any]]) -> Any:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    return Problem("stands more than once in the record", twice, case_id_of(record))


def _json_lines(data: bytes) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    # Only "\n" ends a line: str.splitlines would also cut at separators that may stand inside JSON strings.
    for line, raw in enumerate(data.split(b"\n"), 1):
        if raw.strip():
            try:
                yield line, decoder.decode(raw.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield line, _undecodable(error, line)


_LIST_BEGIN = re.compile(r"\s*\[\s*(\]?)\s*", re.ASCII)
_LIST_NEXT = re.compile(r"\s*([,\]])\s*", re.ASCII)


def _json_list(data: bytes) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    line, counted, at, wanted = 1, 0, 0, "a list of records (one record per line is .jsonl)"
    try:
        text = data.decode("utf-8")
        mark = _LIST_BEGIN.match(text)
        # Record by record, since a decoder of the whole list would lose the lines on which they begin.
        while mark and mark[1] != "]":
            line, counted = line + text.count("\n", counted, mark.end()), mark.end()
            record, at = decoder.raw_decode(text, counted)
            yield line, record
            mark, wanted = _LIST_NEXT.match(text, at), "',' or ']'"
        if not mark:
            raise json.JSONDecodeError(f"Expecting {wanted}", text, at)
        if mark.end() != len(text):
            raise json.JSONDecodeError("Extra data", text, mark.end())
    except (ValueError, RecursionError) as error:
        raise InvalidEdits([_undecodable(error, line)]) from None


def _undecodable(error: Exception, line: int) -> Problem:
    """`line`: where the record begins; the fault itself may stand on a later one."""
    if isinstance(error, json.JSONDecodeError):
        got = repr(error.doc[error.pos : error.pos + 20]) if error.doc[error.pos :].strip() else "the end"
        wrong = f"broken JSON at column {error.colno}: {error.msg}, got {got}"
        return Problem(wrong, line=max(line, error.lineno))
    if isinstance(error, UnicodeDecodeError):
        before = error.object[: error.start]
        column = len(before) - before.rfind(b"\n")
        wrong = f"must be UTF-8, got byte 0x{error.object[error.start]:02x} at byte {column} of the line"
        return Problem(wrong, line=line + before.count(b"\n"))
    return Problem(f"cannot be read as JSON: {error}", line=line)


def load_edits(
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    start: int = 0,
    form: str = "auto",
    target_field: str | None = None,
    on_invalid: str = "refuse",
    readers: Sequence[Reader] = READERS,
) -> EditSet:
    """Read records start .. start + limit of a `.jsonl` file, or of a `.json` file that is a list of records.

    UTF-8, with or without a byte order mark; blank lines are skipped. A record without a case_id is named by
    its position in the file, counted from 0, whatever `start` is; the edits of a record that holds several are
    named 7.1, 7.2 ... after it. Records outside the range are not judged.

    form: the name of a reader, or "auto" to know every record by its fields
    target_field: the field towards which is edited, for a form that has several; default: its usual one
    on_invalid: "refuse" raises on any problem; "skip" leaves the wrong records out, `EditSet.skipped` says why.
        A broken line of a `.jsonl` file can be skipped, a broken `.json` file cannot

    Raises `InvalidEdits` with every problem found, also if nothing is left; `ValueError` for a negative start, a
    limit below 1, and names that are not known.
    """
    if start < 0 or (limit is not None and limit < 1):
        raise ValueError(f"load_edits: wanted start >= 0 and limit >= 1, got start={start}, limit={limit}")
    check_on_invalid(on_invalid)
    source = os.fspath(path)
    gathered = _Gathered(readers, form, target_field)
    try:
        for position, line, record in _records_between(source, start, limit):
            gathered.add(position, line, record)
    except InvalidEdits as error:
        raise InvalidEdits(replace(each, source=source) for each in (*gathered.problems, *error.problems)) from None
    problems = tuple(replace(problem, source=source) for problem in gathered.problems)
    if problems and (on_invalid == "refuse" or not gathered.edits):
        raise InvalidEdits(problems)
    return EditSet(
        edits=tuple(gathered.edits),
        source=source,
        form="+".join(gathered.targets),
        lines=tuple(gathered.lines),
        target_field="+".join(gathered.targets.values()),
        skipped=problems,
        ignored=tuple(gathered.ignored),
    )


def _records_between(source: str, start: int, limit: int | None) -> Iterator[tuple[int, int, Any]]:
    """(position, line, record) for the records asked for; `InvalidEdits` if there are none."""
    count = 0
    for position, (line, record) in enumerate(_records(source)):
        if limit is not None and position >= start + limit:
            return
        count = position + 1
        if position >= start:
            yield position, line, record
    if count <= start:
        held = f"holds {count} records, none at start={start}" if count else "holds no records"
        raise InvalidEdits([Problem(held)])


class _Gathered:
    """What the records read so far have given. A record with a problem gives no edit."""

    def __init__(self, readers: Sequence[Reader], form: str, target_field: str | None) -> None:
        self.readers = [reader for reader in readers if form in ("auto", reader.name)]
        if not self.readers:
            raise ValueError(f"form must be one of auto, {_names(readers)}, got {form!r}")
        self.target_field = target_field
        # What another form edits towards is no mere column: the record may be meant to have that form.
        self.target_owners = {
            re.split(r"\W", target)[0]: reader.name for reader in readers for target in reader.target_fields
        }
        self.edits: list[Edit] = []
        self.lines: list[int] = []
        self.targets: dict[str, str] = {}
        self.ignored: dict[str, None] = {}
        self.problems: list[Problem] = []
        self.holders: dict[str, str] = {}

    def add(self, position: int, line: int, record: Any) -> None:
        """Read one record; `record` is a `Problem` if it could not be decoded."""
        edits: list[Edit] = []
        problems: list[Problem] = []
        try:
            edits = self._read(record, position)
            case_ids = [edit.case_id for edit in edits]
        except InvalidEdits as error:
            problems = [replace(problem, line=problem.line or line) for problem in error.problems]
            case_ids = [problems[0].case_id]
        for case_id in case_ids:
            found = repeated(self.holders, case_id, f"the record on line {line}")
            problems += [replace(problem, line=line) for problem in found]
        self.problems += problems
        if not problems:
            self.edits += edits
            self.lines += [line] * len(edits)

    def _read(self, record: Any, position: int) -> list[Edit]:
        """The record's edits with their case_ids. Raises `InvalidEdits`."""
        if isinstance(record, Problem):
            raise InvalidEdits([record])
        if not isinstance(record, dict):
            hint = "; a list of records belongs in a .json file" if isinstance(record, list) else ""
            raise InvalidEdits([Problem(f"a record must be an object, got {show(record)}{hint}")])
        case_id = position if record.get("case_id") is None else case_id_of(record)
        problems: list[Problem] = []
        edits: list[Edit] = []
        if reader := self._reader_of(record, problems):
            target = self._target_of(reader)
            problems += self._stray(reader, record)
            try:
                edits = _edits(reader, record, target)
            except InvalidEdits as error:
                problems += error.problems
            except KeyError as error:
                problems.append(Problem("is missing", str(error.args[0])))
            except ValueError as error:
                problems.append(Problem(str(error)))
            if not problems:
                self.targets.setdefault(reader.name, target)
        if problems:
            raise InvalidEdits(
                each if each.case_id is not None else replace(each, case_id=case_id) for each in problems
            )
        if len(edits) == 1:
            return [named(edits[0], position)]
        return [edit.model_copy(update={"case_id": f"{case_id}.{number}"}) for number, edit in enumerate(edits, 1)]

    def _reader_of(self, record: dict[str, Any], problems: list[Problem]) -> Reader | None:
        if len(self.readers) == 1:
            return self.readers[0]
        fitting = [reader for reader in self.readers if reader.matches(record)]
        if len(fitting) == 1:
            return fitting[0]
        wrong = f"has fields that no form ({_names(self.readers)}) knows: {show(list(record))}"
        if fitting:
            wrong = f"could be of form {' or '.join(reader.name for reader in fitting)}; say which with form"
        problems.append(Problem(wrong))
        return None

    def _target_of(self, reader: Reader) -> str:
        if self.target_field is None:
            return reader.target_fields[0]
        if self.target_field not in reader.target_fields:
            known = ", ".join(reader.target_fields)
            raise ValueError(f"target_field for form {reader.name} must be one of {known}, got {self.target_field!r}")
        return self.target_field

    def _stray(self, reader: Reader, record: dict[str, Any]) -> Iterator[Problem]:
        """Fields that the form does not know and that are no column to ignore."""
        for name in record if reader.fields else ():
            if name in reader.fields:
                continue
            owner = self.target_owners.get(name)
            if not reader.is_open or difflib.get_close_matches(name, reader.fields, n=1, cutoff=MISSPELT):
                yield Problem(unknown_field(name, reader.fields), name)
            elif owner is not None:
                yield Problem(f"is what form {owner} edits towards, and unknown to form {reader.name}", name)
            else:
                self.ignored[name] = None


def _edits(reader: Reader, record: dict[str, Any], target: str) -> list[Edit]:
    edits = list(reader.to_edits(record, target))
    if not edits or not all(isinstance(edit, Edit) for edit in edits):
        raise TypeError(f"reader {reader.name!r}: to_edits must return one Edit or several, got {show(edits)}")
    return edits


def _names(readers: Iterable[Reader]) -> str:
    return ", ".join(reader.name for reader in readers)
