"""What the settings of all methods share: frozen models that refuse unknown fields, and changes to single fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)


class Config(BaseModel):
    """Settings: frozen, and an unknown field is an error that names it.

    Settings are recorded in run directories. A field that is added later declares the value that it has in older runs,
    `Field(..., json_schema_extra={"before": ...})`, and a field that is removed stays in `removed` with the value that
    the code without it keeps to; see :mod:`fastedit.runs.fields`."""

    removed: ClassVar[Mapping[str, Any]] = {}

    model_config = ConfigDict(frozen=True, extra="forbid")


class MomentConfig(Config):
    """How much background text is read.

    tokens: in all
    window: tokens of a text window
    token_budget: tokens that run together, which bounds memory
    """

    tokens: int = Field(100_000, ge=1)
    window: int = Field(256, ge=8)
    token_budget: int = Field(1024, ge=8)


class EditConfig(Config):
    """The settings of a method."""


def changed(config: AnyConfig, changes: Mapping[str, Any]) -> AnyConfig:
    """A copy of `config` with other values: {"rounds": 2, "value": {"steps": 10}} leaves the rest of `value` as it is.

    Raises ValueError naming a field that is unknown or a value that does not fit."""
    return type(config).model_validate(_merged(config.model_dump(), changes))


def parse_changes(assignments: Sequence[str]) -> dict[str, Any]:
    """["rounds=2", "value.steps=10"] as the changes that `changed` takes; values are read as YAML.

    Raises ValueError for an assignment without a name or an equals sign."""
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not all(name.split(".")):
            raise ValueError(f"a setting must look like rounds=2 or value.steps=10, got {assignment!r}")

        *path, last = name.split(".")
        place = changes
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"{part!r} is set twice, the second time by {assignment!r}")
        place[last] = yaml.safe_load(text)
    return changes


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(old)
    for name, value in new.items():
        part = both.get(name)
        both[name] = _merged(part, value) if isinstance(part, dict) and isinstance(value, Mapping) else value
    return both
