"""Rows of families as plain data: a YAML file of module paths and names, and what a run directory keeps of a row.

    like: llama                 the row to start from; without it every field without a default must be there
    name: mine
    layers: transformer.blocks
    attend: attend_in_pairs     a function, by its name in :mod:`fastedit.model.attention_modules`

Nothing of it is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from fastedit.model.attention_modules import ATTENDS, ROTATES
from fastedit.model.families import FAMILIES, Family
from fastedit.records.edit import unknown_field
from fastedit.records.files import read_text
from fastedit.runtime.plain_yaml import NotPlain, plain_yaml
from fastedit.runtime.words import shown

LIKE = "like"
FUNCTIONS: dict[str, dict[str, Any]] = {
    "rotate": {function.__name__: function for function in ROTATES},
    "attend": {function.__name__: function for function in ATTENDS},
}
REQUIRED = tuple(part.name for part in fields(Family) if part.default is MISSING)


def read_family(path: str | Path) -> Family:
    """The row that a YAML file describes.

    Raises ValueError, one sentence for each wrong field, all with the name of the file; OSError as `read_text`."""
    try:
        data = plain_yaml(read_text(path))
    except NotPlain as error:
        place = "" if error.line is None else f":{error.line}:{error.column}"
        raise ValueError(f"{path}{place}: {error}") from None

    return family_from(data, str(path))


def family_from(data: Any, where: str) -> Family:
    """The row that plain data describe. where: the name of their file, for errors

    Raises ValueError, one sentence for each wrong field, all beginning with `where`."""
    if not isinstance(data, dict):
        raise ValueError(
            f"{where}: a family must be a mapping of its fields, such as layers: model.layers, got {shown(data)}"
        )

    base = _base(data.get(LIKE), where)
    given = {name: value for name, value in data.items() if name != LIKE}
    known = [LIKE, *(part.name for part in fields(Family))]
    problems = [f"{shown(name)} {unknown_field(str(name), known)}" for name in given if name not in known]

    values = {}
    for name in (name for name in given if name in known):
        try:
            values[name] = _value(name, given[name])
        except ValueError as error:
            problems.append(f"{name} {error}")

    if base is None:
        missing = [name for name in REQUIRED if name not in given]
        problems += [f"{name} is missing; give it, or `like: llama` (or another row) to start from" for name in missing]
    if problems:
        raise ValueError("\n".join(f"{where}: {problem}" for problem in problems))

    return Family(**values) if base is None else replace(base, **values)


def as_data(row: Family) -> dict[str, Any] | None:
    """A row as `family_from` reads it, without the fields that have their default; None if a function in it is none of
    ours, which data cannot name."""
    data: dict[str, Any] = {}
    for part in fields(Family):
        value = getattr(row, part.name)
        if value == part.default:
            continue

        if part.name in FUNCTIONS:
            name = getattr(value, "__name__", "")
            if FUNCTIONS[part.name].get(name) is not value:
                return None
            value = name
        elif part.name == "layer_modules":
            value = sorted(value)
        elif part.name == "config":
            value = dict(value)

        data[part.name] = value

    return data


def _base(name: Any, where: str) -> Family | None:
    """The row that another is like; None for None."""
    if name is None:
        return None

    rows = {row.name: row for row in FAMILIES}
    if not isinstance(name, str) or name not in rows:
        raise ValueError(f"{where}: {LIKE} names no row: {shown(name)} {unknown_field(str(name), rows)}")

    return rows[name]


def _value(name: str, value: Any) -> Any:
    """A field's value of a plain one. Raises ValueError saying what is wanted, as the end of a sentence."""
    if name in FUNCTIONS:
        if not isinstance(value, str) or value not in FUNCTIONS[name]:
            raise ValueError(
                f"must name one of our functions: {shown(value)} {unknown_field(str(value), FUNCTIONS[name])}"
            )
        return FUNCTIONS[name][value]

    if name == "parallel":
        return _checked(value, isinstance(value, bool), "true or false")
    if name == "n_positions":
        is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return _checked(value, value is None or is_count, "a whole number above 0, or null")
    if name == "layer_modules":
        is_list = isinstance(value, list) and all(isinstance(part, str) for part in value)
        return frozenset(_checked(value, is_list, "a list of names, such as [attn, mlp, ln_1, ln_2]"))
    if name == "config":
        return _entries(value)

    may_be_null = name not in REQUIRED and name != "activation"
    wanted = "a text" if not may_be_null else "a text, or null"
    return _checked(value, (isinstance(value, str) and bool(value)) or (value is None and may_be_null), wanted)


def _entries(value: Any) -> tuple[tuple[str, object], ...]:
    """Entries of a config. Raises ValueError for what is no mapping of names to single values."""
    is_plain = isinstance(value, Mapping) and all(
        isinstance(name, str) and not isinstance(entry, (list, dict)) for name, entry in value.items()
    )
    checked = _checked(value, is_plain, "a mapping of config entries to single values, {} for none")

    return tuple(checked.items())


def _checked(value: Any, is_right: bool, wanted: str) -> Any:
    if not is_right:
        raise ValueError(f"must be {wanted}, got {shown(value)}")

    return value
