"""Reads edits from data files: decodes a file, recognises the form of each record, and says where a problem is.

All problems of a file are raised together in one `InvalidEdits`. The forms of records are in
:mod:`fastedit.records.forms`.
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

from fastedit.records.check import OnInvalid, check_on_invalid, claim_case_id, with_case_id
from fastedit.records.edit import Edit, EditSet, InvalidEdits, Problem, case_id_of, show, unknown_field
from fastedit.records.files import not_text, read_plain
from fastedit.records.forms import READERS, Reader
from fastedit.runtime.words import told_by

# The similarity from which a name counts as a known one misspelt: `rephrse` does, `subject_id` does not.
MISSPELT = 0.85

# Bytes of a line of a .jsonl file. The longest published records have some ten thousand.
LONGEST_LINE = 10_000_000


def _records(source: str) -> Iterator[tuple[int, Any]]:
    """(line, record) for each record of the file, with a `Problem` in place of a record that cannot be decoded.

    Raises `InvalidEdits` if the file, or what follows a fault in it, cannot be read.
    """
    data = _read_file(source)
    is_lines = os.path.splitext(source)[1].lower() == ".jsonl"

    yield from _json_lines(data) if is_lines and not _is_printed(data) else _json_list(data)


def _read_file(source: str) -> bytes:
    """The bytes of a file without byte order mark. Raises `InvalidEdits` unless it is a JSON file with content."""
    suffix = os.path.splitext(source)[1].lower()
    message = ""

    try:
        data = read_plain(source).removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        message = "no such file"
    except OSError as error:
        message = "is a folder" if os.path.isdir(source) else f"cannot be read: {error.strerror}"
    else:
        if suffix not in (".jsonl", ".json"):
            what = not_text(data)
            message = f"must be a .jsonl or .json file, got {suffix or 'no suffix'}{what and f', {what}'}"
        elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            message = "must be UTF-8, got UTF-16"
        elif what := not_text(data):
            message = f"must be JSON as UTF-8 text, and is {what}"
        elif not data.strip():
            message = "is empty"

    if message:
        raise InvalidEdits([Problem(message)])

    return data


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """A JSON object as a dict, or a `Problem` if a name occurs twice, of which `dict` would keep the last."""
    record = dict(pairs)
    if len(record) == len(pairs):
        return record

    names = [name for name, _ in pairs]
    repeated = next(name for name in names if names.count(name) > 1)

    return Problem("occurs more than once in the record", repeated, case_id_of(record))


def _json_lines(data: bytes) -> Iterator[tuple[int, Any]]:
    """As `_records`, for one record per line."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)

    # Only "\n" ends a line. str.splitlines would also cut at separators that JSON strings may contain.
    for line, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        if len(raw) > LONGEST_LINE:
            yield line, Problem(f"has {len(raw) / 1e6:.0f} MB, a record at most {LONGEST_LINE / 1e6:.0f} MB", line=line)
            continue

        try:
            yield line, decoder.decode(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            yield line, _undecodable(error, line)


def _is_printed(data: bytes) -> bool:
    """Whether data are a list, or one record, over several lines, as programs print it to be read by people.

    Raises `InvalidEdits` for a record, since nothing says where the next one begins."""
    first = data.lstrip().split(b"\n", 1)[0].strip()

    if first == b"[":
        return True

    if first == b"{":
        message = "a record goes on over several lines; write each on one line, or name a list of records .json"
        raise InvalidEdits([Problem(message, line=data[: data.index(b"{")].count(b"\n") + 1)])

    return False


_LIST_BEGIN = re.compile(r"\s*\[\s*(\]?)\s*", re.ASCII)
_LIST_NEXT = re.compile(r"\s*([,\]])\s*", re.ASCII)


def _json_list(data: bytes) -> Iterator[tuple[int, Any]]:
    """As `_records`, for a list of records. Nothing after a fault can be read."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    expected = "a list of records (one record per line is .jsonl)"
    line = 1
    record_start = 0
    record_end = 0

    try:
        text = data.decode("utf-8")
        mark = _LIST_BEGIN.match(text)

        # Record by record, because decoding the whole list would lose the lines on which records begin.
        while mark and mark[1] != "]":
            line += text.count("\n", record_start, mark.end())
            record_start = mark.end()
            record, record_end = decoder.raw_decode(text, record_start)
            yield line, record

            mark = _LIST_NEXT.match(text, record_end)
            expected = "',' or ']'"

        if not mark:
            raise json.JSONDecodeError(f"Expecting {expected}", text, record_end)
        if mark.end() != len(text):
            raise json.JSONDecodeError("Extra data", text, mark.end())
    except (ValueError, RecursionError) as error:
        raise InvalidEdits([_undecodable(error, line)]) from None


def _undecodable(error: Exception, line: int) -> Problem:
    """The problem behind an error of the decoder.

    line: where the record begins; the fault may be on a later line"""
    if isinstance(error, json.JSONDecodeError):
        got = repr(error.doc[error.pos : error.pos + 20]) if error.doc[error.pos :].strip() else "the end"
        message = f"broken JSON at column {error.colno}: {error.msg}, got {got}"
        return Problem(message, line=max(line, error.lineno))

    if isinstance(error, UnicodeDecodeError):
        before = error.object[: error.start]
        column = len(before) - before.rfind(b"\n")
        message = f"must be UTF-8, got byte 0x{error.object[error.start]:02x} at byte {column} of the line"
        return Problem(message, line=line + before.count(b"\n"))

    return Problem(f"cannot be read as JSON: {told_by(error)}", line=line)


def load_edits(
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    start: int = 0,
    form: str = "auto",
    target_field: str | None = None,
    on_invalid: OnInvalid = "refuse",
    readers: Sequence[Reader] = READERS,
) -> EditSet:
    """Read edits from a `.jsonl` file, or from a `.json` file that is a list of records, which over
    several lines may be named `.jsonl` too.

    The file is UTF-8, with or without a byte order mark; blank lines are skipped. A record without a case_id gets its
    position in the file, counted from 0, as one. The edits of a record that holds several get case_ids such as 7.1
    and 7.2.

    start, limit: read the records start .. start + limit - 1; limit None = all from start on. Others are not checked
    form: the name of a reader, or "auto" to recognise the form of each record by its fields
    target_field: the field of the record that becomes `target_new`, for a form that has several; None = its usual one
    on_invalid: "refuse" raises on any problem; "skip" leaves out the records that have one, and `EditSet.skipped`
        holds their problems. A broken line of a `.jsonl` file can be skipped, a broken `.json` file cannot
    readers: the forms that a record can have

    Raises `InvalidEdits` with all problems, also if no edit is left; `ValueError` for a negative start, a limit
    below 1, an unknown form or target_field, or another value of on_invalid.
    """
    if start < 0 or (limit is not None and limit < 1):
        raise ValueError(f"load_edits: wanted start >= 0 and limit >= 1, got start={start}, limit={limit}")
    check_on_invalid(on_invalid)

    source = os.fspath(path)
    loader = _Loader(readers, form, target_field)
    try:
        for position, line, record in _records_between(source, start, limit):
            loader.add(position, line, record)
    except InvalidEdits as error:
        problems = (*loader.problems, *error.problems)
        raise InvalidEdits(replace(problem, source=source) for problem in problems) from None

    problems = tuple(replace(problem, source=source) for problem in loader.problems)
    if problems and (on_invalid == "refuse" or not loader.edits):
        raise InvalidEdits(problems)

    return EditSet(
        edits=tuple(loader.edits),
        source=source,
        form="+".join(loader.targets),
        lines=tuple(loader.lines),
        target_field="+".join(loader.targets.values()),
        skipped=problems,
        ignored=tuple(loader.ignored),
    )


def _records_between(source: str, start: int, limit: int | None) -> Iterator[tuple[int, int, Any]]:
    """(position, line, record) for the records start .. start + limit - 1. Raises `InvalidEdits` if there are none."""
    count = 0

    for position, (line, record) in enumerate(_records(source)):
        if limit is not None and position >= start + limit:
            return
        count = position + 1
        if position >= start:
            yield position, line, record

    if count <= start:
        message = f"holds {count} records, none at start={start}" if count else "holds no records"
        raise InvalidEdits([Problem(message)])


class _Loader:
    """Turns records into edits, one after the other. A record with a problem gives no edit.

    edits, lines: the edits so far, and the line of the record of each
    targets: form -> the field that became `target_new`; ignored: names of ignored fields, in the order of occurrence
    problems: those of all records so far
    """

    def __init__(self, readers: Sequence[Reader], form: str, target_field: str | None) -> None:
        self.readers = [reader for reader in readers if form in ("auto", reader.name)]
        if not self.readers:
            raise ValueError(f"form must be one of auto, {_names(readers)}, got {form!r}")

        self.target_field = target_field
        # A field that is the target of another form is not ignored: the record may be meant to have that form.
        self.form_of_target = {
            re.split(r"\W", target)[0]: reader.name for reader in readers for target in reader.target_fields
        }

        self.edits: list[Edit] = []
        self.lines: list[int] = []
        self.targets: dict[str, str] = {}
        # A dict, because it keeps the order.
        self.ignored: dict[str, None] = {}
        self.problems: list[Problem] = []
        self._owners: dict[str, str] = {}

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
            conflicts = claim_case_id(self._owners, case_id, f"the record on line {line}")
            problems += [replace(conflict, line=line) for conflict in conflicts]

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
        try:
            edits = self._edits_of(record)
        except InvalidEdits as error:
            raise InvalidEdits(
                problem if problem.case_id is not None else replace(problem, case_id=case_id)
                for problem in error.problems
            ) from None

        if len(edits) == 1:
            return [with_case_id(edits[0], position)]

        return [edit.model_copy(update={"case_id": f"{case_id}.{number}"}) for number, edit in enumerate(edits, 1)]

    def _edits_of(self, record: dict[str, Any]) -> list[Edit]:
        """The record's edits as its reader makes them. Raises `InvalidEdits`."""
        reader = self._reader_of(record)
        target = self._target_of(reader)
        problems = list(self._unknown_fields(reader, record))

        try:
            edits = _read_with(reader, record, target)
        except InvalidEdits as error:
            problems += error.problems
        except KeyError as error:
            problems.append(Problem("is missing", str(error.args[0])))
        except ValueError as error:
            problems.append(Problem(str(error)))

        if problems:
            raise InvalidEdits(problems)

        self.targets.setdefault(reader.name, target)

        return edits

    def _reader_of(self, record: dict[str, Any]) -> Reader:
        """The reader of the record's form. Raises `InvalidEdits` unless exactly one fits."""
        if len(self.readers) == 1:
            return self.readers[0]

        fitting = [reader for reader in self.readers if reader.matches(record)]
        if len(fitting) == 1:
            return fitting[0]

        if fitting:
            message = f"could be of form {' or '.join(reader.name for reader in fitting)}; say which with form"
        else:
            message = f"has fields that no form ({_names(self.readers)}) knows: {show(list(record))}"
        raise InvalidEdits([Problem(message)])

    def _target_of(self, reader: Reader) -> str:
        """The field that becomes `target_new`. Raises ValueError for one that the form does not have."""
        if self.target_field is None:
            return reader.target_fields[0]

        if self.target_field not in reader.target_fields:
            known = ", ".join(reader.target_fields)
            raise ValueError(f"target_field for form {reader.name} must be one of {known}, got {self.target_field!r}")

        return self.target_field

    def _unknown_fields(self, reader: Reader, record: dict[str, Any]) -> Iterator[Problem]:
        """A problem for each field that the form does not have, unless it can be ignored."""
        for name in record if reader.fields else ():
            if name in reader.fields:
                continue

            other_form = self.form_of_target.get(name)
            if not reader.is_open or difflib.get_close_matches(name, reader.fields, n=1, cutoff=MISSPELT):
                yield Problem(unknown_field(name, reader.fields), name)
            elif other_form is not None:
                yield Problem(f"is what form {other_form} edits towards, and unknown to form {reader.name}", name)
            else:
                self.ignored[name] = None


def _read_with(reader: Reader, record: dict[str, Any], target: str) -> list[Edit]:
    """The edits that a reader makes of a record. Raises TypeError if it returns anything else."""
    edits = list(reader.to_edits(record, target))

    if not edits or not all(isinstance(edit, Edit) for edit in edits):
        raise TypeError(f"reader {reader.name!r}: to_edits must return one Edit or several, got {show(edits)}")

    return edits


def _names(readers: Iterable[Reader]) -> str:
    """The names of readers for a message."""
    return ", ".join(reader.name for reader in readers)
