"""Edits from data files: the decoding of a file, the forms of record that are known, and where it went wrong.

A file is judged as a whole: all its problems are raised together as one `InvalidEdits`. A new form of record
takes one more `Reader`, here or in `load_edits(..., readers=...)`; nothing else knows the forms of records.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastedit.edits import (
    Edit,
    EditSet,
    InvalidEdits,
    Probe,
    Problem,
    case_id_of,
    named,
    raise_if_any,
    repeated,
    show,
    unknown,
)


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


@dataclass(frozen=True)
class Reader:
    """Makes edits from one form of record. A record goes to the first reader for which `matches` is true.

    `to_edit` raises `InvalidEdits` or `ValueError` for a wrong record; its `KeyError` means a missing field.
    """

    name: str
    matches: Callable[[dict[str, Any]], bool]
    to_edit: Callable[[dict[str, Any]], Edit]


_PLAIN = {name: name for name in ("case_id", "prompt", "subject", "target_new")}
_FLAT = {
    **_PLAIN,
    "ground_truth": "target_true",
    "rephrase_prompt": "rephrase_prompts",
    "locality_prompt": "locality.prompt",
    "locality_ground_truth": "locality.answer",
}


def _has_any(names: Iterable[str], record: dict[str, Any]) -> bool:
    return any(name in record for name in names)


def _flat_edit(fields: Mapping[str, str], record: dict[str, Any]) -> Edit:
    """An edit from a record whose fields fill those of `Edit` as `fields` says; problems name the former."""
    case_id = case_id_of(record)
    problems = [Problem(unknown(name, _FLAT), name, case_id) for name in record if name not in fields]
    values = {fields[name]: value for name, value in record.items() if name in fields}
    probe = {part: values.pop(f"locality.{part}", None) for part in Probe._fields}
    given = {part: value for part, value in probe.items() if value is not None}
    try:
        edit = Edit(**values, locality=given or None)
    except InvalidEdits as error:
        own_names = {name: own for own, name in fields.items()}
        for problem in error.problems:
            name = re.sub(r"\[\d+\]", "", str(problem.field))
            problems.append(replace(problem, field=own_names.get(name, problem.field)))
    if problems:
        raise InvalidEdits(problems)
    return edit


DEFAULT_READERS = (
    Reader("counterfact", partial(_has_any, _FLAT.keys() - _PLAIN.keys()), partial(_flat_edit, _FLAT)),
    Reader("plain", partial(_has_any, ("prompt", "subject", "target_new")), partial(_flat_edit, _PLAIN)),
)


def load_edits(
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    start: int = 0,
    readers: Sequence[Reader] = DEFAULT_READERS,
) -> EditSet:
    """Read records start .. start + limit of a `.jsonl` file, or of a `.json` file that is a list of records.

    UTF-8, with or without a byte order mark; blank lines are skipped. A record without a case_id is named by
    its position in the file, counted from 0, whatever `start` is. Records outside the range are not judged.
    Raises `InvalidEdits` with every problem found, `ValueError` for a negative start or a limit below 1.
    """
    if start < 0 or (limit is not None and limit < 1):
        raise ValueError(f"load_edits: wanted start >= 0 and limit >= 1, got start={start}, limit={limit}")
    source = os.fspath(path)
    loaded: list[tuple[Edit, int]] = []
    problems: list[Problem] = []
    forms: dict[str, None] = {}
    holders: dict[str, str] = {}
    try:
        for position, line, record in _records_between(source, start, limit):
            try:
                edit, form = _read(record, position, readers)
                case_id = edit.case_id
                forms[form] = None
                loaded.append((edit, line))
            except InvalidEdits as error:
                problems += [replace(problem, line=problem.line or line) for problem in error.problems]
                case_id = error.problems[0].case_id
            found = repeated(holders, case_id, f"the record on line {line}")
            problems += [replace(problem, line=line) for problem in found]
    except InvalidEdits as error:
        problems += error.problems
    raise_if_any([replace(problem, source=source) for problem in problems])
    edits, lines = zip(*loaded, strict=True)
    return EditSet(edits, source, "+".join(forms), lines)


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


def _read(record: Any, position: int, readers: Sequence[Reader]) -> tuple[Edit, str]:
    """The record's edit with its case_id, and the name of its reader. Raises `InvalidEdits`."""
    if isinstance(record, Problem):
        raise InvalidEdits([record])
    if not isinstance(record, dict):
        hint = "; a list of records belongs in a .json file" if isinstance(record, list) else ""
        raise InvalidEdits([Problem(f"a record must be an object, got {show(record)}{hint}")])
    case_id = position if record.get("case_id") is None else case_id_of(record)
    reader = next((reader for reader in readers if reader.matches(record)), None)
    if reader is None:
        names = ", ".join(reader.name for reader in readers)
        wrong = f"has fields that no reader ({names}) knows: {show(list(record))}"
        raise InvalidEdits([Problem(wrong, case_id=case_id)])
    try:
        edit = reader.to_edit(record)
    except InvalidEdits as error:
        own = error.problems
        raise InvalidEdits(
            replace(each, case_id=case_id if each.case_id is None else each.case_id) for each in own
        ) from None
    except KeyError as error:
        raise InvalidEdits([Problem("is missing", str(error.args[0]), case_id)]) from error
    except ValueError as error:
        raise InvalidEdits([Problem(str(error), case_id=case_id)]) from error
    if not isinstance(edit, Edit):
        raise TypeError(f"reader {reader.name!r}: to_edit must return an Edit, got {show(edit)}")
    return named(edit, position), reader.name
