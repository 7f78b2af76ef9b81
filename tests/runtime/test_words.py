"""Numbers with their nouns, and what others say, on one line."""

from __future__ import annotations

from fastedit.runtime.words import counted, grouped, shown, told_by


def test_numbers_have_their_nouns() -> None:
    assert (counted(1, "batch", "batches"), counted(2, "batch", "batches"), counted(0, "edit")) == (
        "1 batch",
        "2 batches",
        "0 edits",
    )
    assert (grouped(16_000), grouped(999), grouped(1_234_567.8)) == ("16 000", "999", "1 234 568")


def test_long_values_are_cut() -> None:
    assert shown("x") == "'x'"
    assert shown("x" * 100) == "'" + "x" * 56 + "..."


def test_all_that_an_error_says_is_kept_on_one_line() -> None:
    assert told_by(OSError("Error no file named a.bin\n  found in folder:\n  /models/x")) == (
        "Error no file named a.bin found in folder: /models/x"
    )
    assert told_by(KeyError()) == "KeyError"
