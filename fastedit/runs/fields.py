"""How a run holds settings and edits whose classes gain and lose fields after it was written.

A field that is added to a settings class, to `Edit` or to `Probe` after the release that brought the class declares the
value that keeps the old behaviour, beside its default:

    clip: float | None = Field(1.0, json_schema_extra={"before": None})

A run without the field counts as a run with that value. A field at that value is not recorded, so the hash of an edit
stays what it was. For a whole part of the settings, `before` is None or a mapping of its fields.

A class that loses a field names it in `removed`, with the value that the code without it keeps to:

    removed: ClassVar[Mapping[str, Any]] = {"clip": None}

A run with that value can still be read. Every other field that a run holds and this version does not know is refused by
name. tests/runs/test_fields.py lists the fields that need no declaration, and fails for every other one without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fastedit.config import alternatives
from fastedit.runs.log import RunError
from fastedit.runtime.hashing import canonical

# No value is known.
NONE = object()


def recorded(model: BaseModel) -> dict[str, Any]:
    """The fields of settings or of an edit as a run holds them: plain data, without those at their old values."""
    return {
        name: _recorded(getattr(model, name))
        for name, field in type(model).model_fields.items()
        if not _is_old(field, getattr(model, name))
    }


def completed(kind: type[BaseModel], plain: Mapping[str, Any], place: str, where: object) -> dict[str, Any]:
    """What `recorded` left, with every field of the class `kind` that has an old value or a default.

    place: names the whole in the error, as in "config.rounds"; where: the file or folder, for the error.
    Raises RunError naming every field that `kind` does not know."""
    unknown: list[str] = []
    whole: dict[str, Any] = _complete_model(kind, plain, f"{place}.", unknown)

    if unknown:
        raise RunError(
            f"{where}: {', '.join(unknown)}: not known to this version of fastedit; a newer one wrote the run, or the"
            " field was removed since"
        )
    return whole


def fields(kind: type[object]) -> dict[str, FieldInfo]:
    """The fields of a pydantic model or of a NamedTuple."""
    if issubclass(kind, BaseModel):
        return dict(kind.model_fields)

    # mypy does not know that classes have hashes.
    return _tuple_fields(kind)  # type: ignore[arg-type]


def declares_before(field: FieldInfo) -> bool:
    """Whether the field names the value that it has in runs which do not hold it."""
    return isinstance(field.json_schema_extra, dict) and "before" in field.json_schema_extra


@cache
def _tuple_fields(kind: type[object]) -> dict[str, FieldInfo]:
    """kind: a NamedTuple"""
    defaults = getattr(kind, "_field_defaults", {})
    return {
        name: FieldInfo.from_annotated_attribute(hint, defaults[name])
        if name in defaults
        else FieldInfo.from_annotation(hint)
        for name, hint in get_type_hints(kind, include_extras=True).items()
    }


def _recorded(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return recorded(value)

    if _is_named_tuple(type(value)):
        return _recorded_tuple(value)

    if isinstance(value, Mapping):
        return {name: _recorded(part) for name, part in value.items()}

    return [_recorded(part) for part in value] if isinstance(value, (list, tuple)) else value


def _recorded_tuple(value: Any) -> list[Any]:
    """Only the last fields can be left out: a list knows its members by their places."""
    parts = list(value)
    for field in reversed(fields(type(value)).values()):
        if not _is_old(field, parts[-1]):
            break
        parts.pop()
    return [_recorded(part) for part in parts]


def _is_old(field: FieldInfo, value: Any) -> bool:
    """Whether the field was added later and has its old value."""
    return declares_before(field) and _as_json(_recorded(value)) == _before(field)


def _before(field: FieldInfo) -> Any:
    """The value that the field has in a run which does not hold it, as plain data; NONE when there is none."""
    if declares_before(field):
        assert isinstance(field.json_schema_extra, dict)
        value: Any = field.json_schema_extra["before"]
    elif field.is_required():
        return NONE
    else:
        value = field.get_default(call_default_factory=True)

    return _complete(field.annotation, _as_json(_recorded(value)), "", [])


def _complete(hint: Any, data: Any, place: str, unknown: list[str]) -> Any:
    """Fill in what plain data of this type lacks, in all its parts; what is not known goes to `unknown`."""
    for kind in alternatives(hint):
        if isinstance(data, Mapping) and isinstance(kind, type) and issubclass(kind, BaseModel):
            return _complete_model(kind, data, place, unknown)

        if isinstance(data, list) and _is_named_tuple(kind):
            return _complete_tuple(kind, data, place, unknown)

        if isinstance(data, list) and get_origin(kind) in (tuple, list, Sequence):
            members = get_args(kind)
            member = members[0] if len(members) == 1 or Ellipsis in members else Any
            return [_complete(member, part, f"{place.rstrip('.')}[{at}].", unknown) for at, part in enumerate(data)]
    return data


def _complete_model(kind: type[BaseModel], data: Mapping[str, Any], place: str, unknown: list[str]) -> dict[str, Any]:
    known = fields(kind)
    removed: Mapping[str, Any] = getattr(kind, "removed", {})
    whole = {}

    for name, value in data.items():
        if name in known:
            whole[name] = _complete(known[name].annotation, value, f"{place}{name}.", unknown)
        elif name not in removed or _as_json(removed[name]) != value:
            unknown.append(f"{place}{name} = {value!r}")

    missing = {name: _before(field) for name, field in known.items() if name not in data}
    return whole | {name: value for name, value in missing.items() if value is not NONE}


def _complete_tuple(kind: type[Any], data: list[Any], place: str, unknown: list[str]) -> list[Any]:
    known = list(fields(kind).items())
    unknown += [f"{place}{at} = {value!r}" for at, value in enumerate(data[len(known) :], len(known))]

    whole = [
        _complete(field.annotation, value, f"{place}{name}.", unknown)
        for (name, field), value in zip(known, data, strict=False)
    ]
    missing = [_before(field) for _, field in known[len(data) :]]
    return whole + [value for value in missing if value is not NONE]


def _is_named_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _as_json(value: Any) -> Any:
    """Plain data as it comes back from a run."""
    return json.loads(canonical(value))
