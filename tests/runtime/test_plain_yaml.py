"""YAML as plain data: what stands for more than itself is refused, with its place."""

from __future__ import annotations

import pytest

from fastedit.runtime.plain_yaml import NotPlain, plain_yaml

# Nine lines that stand for a list of a billion texts.
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("[4, 5]", [4, 5]),
        ("4-8", "4-8"),
        ("{steps: 3, lr: 0.1}", {"steps": 3, "lr": 0.1}),
        ('"{}\\nAnswer:"', "{}\nAnswer:"),
        ("", None),
        (".inf", float("inf")),
    ],
)
def test_plain_data(text: str, value: object) -> None:
    assert plain_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system [true]", "holds a tag"),
        ("!x 3", "holds a tag"),
        ("!!int 3", "holds a tag"),
        ("&a [1]", "holds an anchor or alias"),
        (BOMB, "holds an anchor or alias"),
        ("{a: 1, a: 2}", "holds 'a' twice"),
        ("{? [1] : 2}", "holds a name that is no text"),
        ("a: b: c", "is not YAML: mapping values are not allowed here"),
        ("{", "is not YAML"),
        ("a\n---\nb", "is not YAML"),
        ("\x00", "is not YAML"),
        ("[" * 100_000 + "]" * 100_000, "is nested too deeply"),
        ("2024-99-99", "holds a value that cannot be read"),
        ("9" * 5000, "holds a value that cannot be read"),
    ],
    ids=lambda text: text[:20],
)
def test_anything_else_is_one_line(text: str, message: str) -> None:
    with pytest.raises(NotPlain) as refused:
        plain_yaml(text)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_the_place_is_named() -> None:
    with pytest.raises(NotPlain) as refused:
        plain_yaml("config:\n  rounds: !x 2\n")
    assert (refused.value.line, refused.value.column, refused.value.is_broken) == (2, 11, False)
