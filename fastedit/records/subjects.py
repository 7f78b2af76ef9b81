"""Where the subject of an edit stands in its prompt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from fastedit.records.join import spaceless

# Characters that look alike -> the one of them that a keyboard has.
_PLAIN = {
    **dict.fromkeys("\u2018\u2019\u201b\u02bc\u02b9\u2032\u00b4`\uff07", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\uff02", '"'),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\uff0d\ufe63", "-"),
    **dict.fromkeys(
        "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t\n\r", " "
    ),
}
_ALIKE = str.maketrans(_PLAIN)
# They are not seen.
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))


def fill(text: str, subject: str) -> str:
    """The text with the subject in place of every `{}`, unless that belongs to the subject."""
    return text if "{}" in subject and subject in text else text.replace("{}", subject)


def slot_of(text: str, subject: str) -> int | None:
    """The character at which the subject of the last `{}` begins in the filled text; None without a slot."""
    if "{}" not in text or ("{}" in subject and subject in text):
        return None

    earlier = text.count("{}") - 1

    return text.rindex("{}") + earlier * (len(subject) - len("{}"))


def places_of(subject: str, text: str) -> list[int]:
    """The characters at which the subject begins: where it is a whole word, or, if it never is, everywhere."""
    everywhere = list(_occurrences(subject, text))

    return [start for start in everywhere if _is_whole(subject, text, start)] or everywhere


def stands_in(subject: str, text: str) -> bool:
    """Whether the subject stands in the text as a whole word."""
    return any(_is_whole(subject, text, start) for start in _occurrences(subject, text))


def _occurrences(subject: str, text: str) -> Iterator[int]:
    start = text.find(subject)

    while start >= 0:
        yield start
        start = text.find(subject, start + 1)


def _is_whole(subject: str, text: str, start: int) -> bool:
    """Whether no word goes on across either end of the occurrence at `start`."""
    end = start + len(subject)
    before, after = text[start - 1 : start] if start else "", text[end : end + 1]

    return not (_one_word(before, subject[:1]) or _one_word(subject[-1:], after))


def _one_word(left: str, right: str) -> bool:
    """Whether two neighbouring characters belong to one word."""
    if not left or not right or spaceless(left) or spaceless(right):
        return False

    return _in_word(left) and _in_word(right)


def _in_word(character: str) -> bool:
    return character == "_" or character.isalnum() or unicodedata.category(character).startswith("M")


def near_miss(subject: str, prompt: str) -> str | None:
    """What differs between a subject and the part of a prompt that looks like it; None if no part does."""
    if other_case := re.search(re.escape(subject), prompt, re.IGNORECASE):
        return f"upper and lower case differ, the prompt has {other_case.group()!r}"

    if unicodedata.normalize("NFC", subject) in unicodedata.normalize("NFC", prompt):
        return "they differ in Unicode normalisation only, write both composed or both decomposed"

    if alike := re.search(re.escape(subject.translate(_ALIKE)), prompt.translate(_ALIKE), re.IGNORECASE):
        part = prompt[slice(*alike.span())]
        pairs = {(a, b): None for a, b in zip(part, subject, strict=False) if a.casefold() != b.casefold()}
        differ = ", ".join(f"{_named(a)} where the subject has {_named(b)}" for a, b in pairs)
        return f"the prompt has {differ}; write both alike"

    plain, wanted = (text.translate(_INVISIBLE).translate(_ALIKE).casefold() for text in (prompt, subject))
    if wanted and wanted in plain:
        hidden = sorted({_named(c) for c in prompt + subject if ord(c) in _INVISIBLE})
        return f"one of them holds what is not seen: {', '.join(hidden)}; write both alike"

    return None


def _named(character: str) -> str:
    """A character by its Unicode name: U+2019 RIGHT SINGLE QUOTATION MARK (\u2019)."""
    name = unicodedata.name(character, "")
    shown = f" ({character})" if character.isprintable() and not character.isspace() else ""

    return f"U+{ord(character):04X} {name}".rstrip() + shown
