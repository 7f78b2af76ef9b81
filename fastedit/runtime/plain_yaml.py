"""Reads YAML as plain data: numbers, text, true, false, null, lists and mappings, and nothing that stands for more."""

from __future__ import annotations

from typing import Any

import yaml

TAGS = "holds a tag (!...), which is not read; write plain numbers, text, lists and mappings"
ANCHORS = "holds an anchor or alias (&, *), which is not read; write the value out"

# Lists and mappings inside each other. Settings need three; PyYAML takes minutes for a hundred thousand.
DEEPEST = 20


class NotPlain(ValueError):
    """Text that is not YAML, or more than plain data.

    reason: to be read behind the name of what holds it
    mark: PyYAML's of the place; line, column: the place, counted from 1; None = not known
    is_broken: whether it is not YAML at all"""

    def __init__(self, reason: str, mark: Any = None, is_broken: bool = False) -> None:
        super().__init__(reason)
        self.is_broken = is_broken
        self.line = None if mark is None else mark.line + 1
        self.column = None if mark is None else mark.column + 1


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, which of two equal names would keep the last silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise NotPlain("holds a name that is no text", key.start_mark)
            if key.value in seen:
                raise NotPlain(f"holds {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def plain_yaml(text: str) -> Any:
    """The one value that a YAML text stands for.

    Raises NotPlain for broken YAML, tags, anchors and aliases (a few lines of which can stand for gigabytes), names
    that occur twice, and more than DEEPEST lists and mappings inside each other."""
    try:
        # Before anything is built, because aliases are followed while it is.
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            _check(event)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise NotPlain("is nested too deeply", event.start_mark)
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise NotPlain(f"is not YAML: {error.problem or error.context}", error.problem_mark, True) from None
    except yaml.YAMLError as error:
        raise NotPlain(f"is not YAML: {' '.join(str(error).split())}", is_broken=True) from None
    except ValueError as error:
        if isinstance(error, NotPlain):
            raise
        # A date that is none, a number of more digits than Python reads.
        raise NotPlain(f"holds a value that cannot be read: {error}") from None


def _check(event: yaml.Event) -> None:
    """Raise NotPlain for what is more than plain data."""
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        raise NotPlain(ANCHORS, event.start_mark)

    if getattr(event, "tag", None) is not None:
        raise NotPlain(TAGS, event.start_mark)
