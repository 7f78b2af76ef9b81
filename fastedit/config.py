"""What the settings of all methods share: frozen models that refuse unknown fields, and changes to single fields.

What is wrong with settings is told in one sentence for each of them: the setting, what was wanted, what was given.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from fastedit.runtime.plain_yaml import NotPlain, plain_yaml
from fastedit.runtime.words import shown

AnyConfig = TypeVar("AnyConfig", bound="Config")

LAYERS_WANTED = "a list of layers (4-8 or 4,6,8)"

# Name of a bound, as pydantic's fields carry it -> its words.
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


class WrongSetting(NamedTuple):
    """One problem of settings.

    path: the names down to the setting, () for the settings as a whole
    kind: "unknown", "missing", or "wrong"
    sentence: for "wrong", what was wanted and given, to be read behind the name
    """

    path: tuple[str, ...]
    kind: Literal["unknown", "missing", "wrong"]
    sentence: str = ""


class WrongSettings(ValueError):
    """Settings with problems, one sentence and one line for each.

    problems: all of them; owner: the class of the settings"""

    def __init__(self, owner: type[Config], problems: Sequence[WrongSetting]) -> None:
        self.owner = owner
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(_sentence(owner, problem) for problem in self.problems))


class Config(BaseModel):
    """Settings: frozen, and an unknown field is an error that names it.

    Settings are recorded in run directories. A field that is added later declares the value that it has in older runs,
    `Field(..., json_schema_extra={"before": ...})`, and a field that is removed stays in `removed` with the value that
    the code without it keeps to; see :mod:`fastedit.runs.fields`.

    Raises WrongSettings with all problems at once."""

    removed: ClassVar[Mapping[str, Any]] = {}

    # A number is finite; a bound that infinity lifts says so, `Field(..., allow_inf_nan=True)`.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Type checkers see pydantic's own, which knows the fields.
    if not TYPE_CHECKING:

        def __init__(self, **fields: Any) -> None:
            problems = list(_true_or_false_for_another(type(self), fields))
            try:
                super().__init__(**fields)
            except ValidationError as error:
                problems += _problems(type(self), fields, error)

            if problems:
                raise WrongSettings(type(self), problems) from None

        def __setattr__(self, name: str, value: Any) -> None:
            raise ValueError(f"{name}: settings are frozen; fastedit.config.changed makes a copy with other values")


def layer_list(given: Any) -> Any:
    """Layers that are written as text, "4-8", "4,6,8" or "2,4-6", or as one number, as a list; all else as it is.

    Raises ValueError for other text."""
    if isinstance(given, int) and not isinstance(given, bool):
        return [given]

    if not isinstance(given, str):
        return given

    layers: list[int] = []
    for part in given.split(","):
        ends = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if ends is None or (ends[2] is not None and int(ends[2]) < int(ends[1])):
            raise ValueError(f"must be {LAYERS_WANTED}, got {shown(given)}")
        layers += range(int(ends[1]), int(ends[2] or ends[1]) + 1)

    return layers


def layers_in_short(layers: Sequence[int]) -> str:
    """Ascending layers as text that `layer_list` reads: [2, 4, 5, 6] is "2,4-6"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])

    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# A setting that is a list of layers; a single number in it is left to the other types of the setting, if it has any.
Layers = Annotated[tuple[int, ...], BeforeValidator(layer_list)]


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

    Raises WrongSettings, a ValueError, naming every field that is unknown and every value that does not fit."""
    return settings_from(type(config), merged(config.model_dump(), changes))


def settings_from(kind: type[AnyConfig], fields: Mapping[str, Any]) -> AnyConfig:
    """Settings of the class `kind` from plain data. Raises WrongSettings, a ValueError.

    A group of settings keeps the defaults that it has in `kind`, which may not be those of its own class: "train" of
    KNE has other losses than that of FiNE."""
    return kind(**_with_group_defaults(kind, _with_text_names(fields)))


def check_changes(kind: type[Config], changes: Mapping[str, Any]) -> None:
    """Judge changes before it is known what they change.

    Raises WrongSettings naming every field that is unknown and every value that does not fit."""
    try:
        settings_from(kind, changes)
    except WrongSettings as error:
        # What is missing may stand in the preset, and so may what two settings say together.
        known = [problem for problem in error.problems if problem.kind != "missing" and problem.path]
        if known:
            raise WrongSettings(kind, known) from None


def parse_changes(assignments: Sequence[str]) -> dict[str, Any]:
    """["rounds=2", "value.steps=10"] as the changes that `changed` takes; values are read as YAML.

    Raises ValueError with a sentence for each assignment without a name or an equals sign, each value that is not plain
    YAML, and each setting that is set twice to different values."""
    changes: dict[str, Any] = {}
    wrong = []
    for assignment in assignments:
        try:
            _assign(changes, assignment)
        except ValueError as error:
            wrong.append(str(error))

    if wrong:
        raise ValueError("\n".join(wrong))
    return changes


def _assign(changes: dict[str, Any], assignment: str) -> None:
    """Put what one assignment says into the changes."""
    name, equals, text = assignment.partition("=")
    path = [part.strip() for part in name.split(".")]
    if not equals or not all(path):
        raise ValueError(f"a setting must look like rounds=2 or value.steps=10, got {shown(assignment)}")

    value = _value(".".join(path), text)
    place = changes
    for part in path[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ValueError(f"{part!r} is set twice, the second time by {shown(assignment)}")

    if path[-1] in place and place[path[-1]] != value:
        raise ValueError(f"{'.'.join(path)!r} is set twice, the second time by {shown(assignment)}")
    place[path[-1]] = value


def _value(name: str, text: str) -> Any:
    try:
        return plain_yaml(text)
    except NotPlain as error:
        advice = "; text with signs of YAML in it goes into quotes" if error.is_broken else ""
        raise ValueError(f"{name}={shown(text)} {error}{advice}") from None


def _with_group_defaults(kind: type[Config], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, each group with the settings that it does not name as they are in `kind`."""
    whole = dict(fields)
    for name, field in kind.model_fields.items():
        if isinstance(field.default, Config) and isinstance(fields.get(name), Mapping):
            whole[name] = merged(field.default.model_dump(), fields[name])
    return whole


def _with_text_names(fields: Mapping[Any, Any]) -> dict[str, Any]:
    """YAML and Python know other names than text; as text they are unknown settings like any others."""
    return {
        str(name): _with_text_names(value) if isinstance(value, Mapping) else value for name, value in fields.items()
    }


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The changes of both; those of `new` count where both change one setting."""
    both = dict(old)
    for name, value in new.items():
        part = both.get(name)
        both[name] = merged(part, value) if isinstance(part, Mapping) and isinstance(value, Mapping) else value
    return both


def setting_of(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a setting by its dotted name, such as value.steps; None where it is not among the fields."""
    value: Any = fields
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def as_changes(name: str, value: Any) -> dict[str, Any]:
    """A setting by its dotted name as the changes that `changed` takes."""
    changes: Any = value
    for part in reversed(name.split(".")):
        changes = {part: changes}
    return dict(changes)


def _true_or_false_for_another(owner: type[Config], fields: Mapping[str, Any]) -> Iterator[WrongSetting]:
    """A problem for each true or false that is given where a number is wanted, which pydantic takes for 1 or 0."""
    for name, field in owner.model_fields.items():
        given = fields.get(name)
        if isinstance(given, bool) and bool not in alternatives(field.annotation):
            yield WrongSetting((name,), "wrong", f"must be {_wanted(field)}, got {given}")


def _problems(owner: type[Config], fields: Mapping[str, Any], error: ValidationError) -> Iterator[WrongSetting]:
    """What pydantic found, in our words. A part of the settings has raised its own WrongSettings inside."""
    for found in error.errors(include_url=False):
        path = tuple(str(part) for part in found["loc"][:1])
        inner = found.get("ctx", {}).get("error")

        if isinstance(inner, WrongSettings):
            yield from (problem._replace(path=path + problem.path) for problem in inner.problems)
        elif found["type"] == "extra_forbidden":
            yield WrongSetting(path, "unknown")
        elif found["type"] == "missing":
            yield WrongSetting(path, "missing")
        elif found["type"] == "value_error" and len(found["loc"]) < 2:
            yield WrongSetting(path, "wrong", str(inner))
        else:
            number = "a finite number" if found["type"] == "finite_number" else "a number"
            wanted, given = _wanted(owner.model_fields[path[0]], number), shown(fields.get(path[0]))
            yield WrongSetting(path, "wrong", f"must be {wanted}, got {given}")


def _sentence(owner: type[Config], problem: WrongSetting) -> str:
    name = ".".join(problem.path)

    if problem.kind == "unknown":
        return f"unknown setting {name}{_did_you_mean(owner, problem.path)}"
    if problem.kind == "missing":
        return f"{name} is missing, and has no default"
    if not name:
        return problem.sentence

    # The checks of a class name their own field, which may be a part of another class.
    return f"{name} {problem.sentence.removeprefix(problem.path[-1]).lstrip()}"


def _did_you_mean(owner: type[Config], path: tuple[str, ...]) -> str:
    """The settings that a mistyped one may stand for, as the end of a sentence."""
    last, whole = path[-1], ".".join(path)
    names = [name for name in _names(owner) if not whole.startswith(f"{name}.")]
    same = [name for name in names if name.rpartition(".")[2] == last]
    close = same or difflib.get_close_matches(whole, names, n=1, cutoff=0.7)

    if not close:
        leaves = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in names], n=1, cutoff=0.75)
        close = [name for name in names if name.rpartition(".")[2] in leaves]
    if close:
        return f"; did you mean {' or '.join(close[:3])}?"

    inside = ".".join(path[:-1])
    siblings = [name for name in names if name.rpartition(".")[0] == inside]
    return f"; there are {', '.join(siblings or names)}"


def _names(owner: type[Config], before: str = "") -> Iterator[str]:
    """The dotted names of all settings, those of a part behind its own name."""
    for name, field in owner.model_fields.items():
        yield f"{before}{name}"
        for kind in alternatives(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Config):
                yield from _names(kind, f"{before}{name}.")


def _wanted(field: FieldInfo, number: str = "a number") -> str:
    """What a setting may be, in words. number: the words for a float"""
    bounds = [
        f"{words} {getattr(mark, sign)}"
        for mark in field.metadata
        for sign, words in BOUNDS.items()
        if getattr(mark, sign, None) is not None
    ]
    kinds = [number if kind is float else _kind(kind) for kind in alternatives(field.annotation)]
    is_list = any(get_origin(kind) is tuple for kind in alternatives(field.annotation))

    return " or ".join(kinds) + (f", {' and '.join(bounds)}" if bounds and not is_list else "")


def _kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"

    if get_origin(kind) is tuple:
        return LAYERS_WANTED if get_args(kind)[0] is int else "a list of texts"

    if isinstance(kind, type) and issubclass(kind, Config):
        first = next(iter(kind.model_fields))
        return f"a group of settings ({', '.join(kind.model_fields)}), each set by its name, such as .{first}"

    names = {int: "a whole number", str: "a text", bool: "true or false", types.NoneType: "null"}
    return names.get(kind, str(kind))


def alternatives(hint: Any) -> list[Any]:
    """The types that a hint allows."""
    origin = get_origin(hint)
    if origin is Annotated:
        return alternatives(get_args(hint)[0])

    if origin in (Union, types.UnionType):
        return [kind for member in get_args(hint) for kind in alternatives(member)]

    return [hint]
