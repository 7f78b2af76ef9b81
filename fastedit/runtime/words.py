"""Numbers with their nouns."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """1 batch, 2 batches. many: the plural; None = `one` with an s"""
    return f"{number} {one if number == 1 else many or one + 's'}"


def shown(value: object) -> str:
    """`repr`, cut to 60 characters."""
    text = repr(value)

    return text if len(text) <= 60 else f"{text[:57]}..."


def grouped(number: float) -> str:
    """16000 as 16 000, to the nearest whole number."""
    return f"{number:,.0f}".replace(",", " ")


def two_digits(value: float) -> float:
    """The number to two significant digits, as settings are given that nobody knows better."""
    return float(f"{value:.2g}")


def told_by(error: BaseException) -> str:
    """All that an error of a library says, on one line; its type where it says nothing.

    Only the whole helps: transformers, safetensors and tokenizers put the cause behind the first line."""
    return " ".join(str(error).split()) or type(error).__name__
