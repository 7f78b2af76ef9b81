"""How a prompt and the text behind it become one text. Training, keys, scores and decoding all ask here.

The field puts one space between prompt and target. That space belongs to the target: " Paris" is one token. Where the
writer has put white space, that is kept as it is, and nothing is added. Where nobody would write a space, there is
none: behind an opening bracket or quote, behind one of `$ # @ / \\ - _ =`, and behind a character of a script that
writes without spaces.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

# Behind these no space is written.
CLOSE_UP = "$#@/\\-_="

# Scripts that write without spaces, with their punctuation: Thai, Lao, Tibetan, Burmese, Khmer, the Tai scripts,
# Balinese, Javanese, Chinese, Japanese, full-width forms; and the zero-width space.
_SPACELESS = re.compile(
    "["
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\u200b"
    "\u2e80-\u2fdf\u2ff0-\u312f\u3190-\u31ff\u3220-\u325f\u3280-\u4dbf\u4e00-\u9fff"
    "\ua980-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\ufe30-\ufe4f\uff01-\uff9f\U00020000-\U0003ffff"
    "]"
)

# A quote that opens in one language and closes in another -> the quote that opens in the other.
_CLOSES = {"\u201c": "\u201e", "\u2018": "\u201a", "\u00ab": "\u00bb"}
# A quote that mostly closes -> those that open before it where it does.
_OPENS = {"\u00bb": "\u00ab", "\u201d": "\u201c\u201e"}


class Joined(NamedTuple):
    """A prompt and its target as the model reads them.

    text: both; start: the character at which the target begins, with the white space that belongs to it
    """

    text: str
    start: int


def joined(prompt: str, target: str, between: str | None = None) -> Joined:
    """Prompt and target as one text.

    between: what to put between them, exactly; None = by the rule above"""
    if between is not None:
        return Joined(f"{prompt}{between}{target}", len(prompt))

    head = opening(prompt)
    tail = target.lstrip(" ")

    if head.endswith(" "):
        space = ""
    elif head != prompt or tail != target:
        space = " "
    else:
        space = "" if head[-1:].isspace() or tail[:1].isspace() or _closes_up(head) else " "

    return Joined(f"{head}{space}{tail}", len(head))


def opening(prompt: str) -> str:
    """The prompt as the model reads it when it is to continue: without the spaces at its end, which belong to what
    follows. Spaces that stand alone on the last line are an indentation and stay."""
    bare = prompt.rstrip(" ")

    return prompt if not bare or bare[-1].isspace() else bare


def spaceless(character: str) -> bool:
    """Whether a character belongs to a script that writes without spaces."""
    return _SPACELESS.match(character) is not None


def _closes_up(text: str) -> bool:
    """Whether what follows a text stands right behind it. text: without white space at its end"""
    last = text[-1:]
    if not last:
        return True

    if last in CLOSE_UP or spaceless(last):
        return True

    return _opens(text, last) if _is_quote(last) else unicodedata.category(last) == "Ps"


def _is_quote(character: str) -> bool:
    return character in "\"'`" or unicodedata.category(character) in ("Pi", "Pf")


def _opens(text: str, last: str) -> bool:
    """Whether the quote at the end of a text is an opening one."""
    if last == "'":
        return _apostrophe_opens(text)

    if last in '"`':
        return text.count(last) % 2 == 1

    if last in _CLOSES:
        return text.count(_CLOSES[last]) < text.count(last)

    if last in _OPENS:
        return text.count(last) % 2 == 1 and not any(opener in text for opener in _OPENS[last])

    return unicodedata.category(last) == "Pi"


def _apostrophe_opens(text: str) -> bool:
    """Whether the straight single quote at the end opens; those inside and behind words are apostrophes."""
    is_open = False

    for mark in re.finditer("'", text):
        before = text[: mark.start()][-1:]
        at_word_start = not before or before.isspace() or unicodedata.category(before) in ("Ps", "Pi")
        inside_word = before.isalnum() and text[mark.end() :][:1].isalnum()
        is_open = not is_open if at_word_start else (is_open and inside_word)

    return is_open
