"""When a progress bar is shown, and what it says."""

from __future__ import annotations

import pytest

from fastedit.runtime.progress import Lines, track


@pytest.fixture
def shown_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastedit.runtime.progress.SHOW_AFTER_S", -1.0)
    # rich animates only what it takes for a terminal.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.usefixtures("shown_at_once")
def test_a_bar_counts_items_and_names_their_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with track(4, "editing", "edits", show=True) as advance:
        advance(1)
        advance(2)
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("editing", "3/4", "edits/s"):
        assert part in captured.err


@pytest.mark.usefixtures("shown_at_once")
@pytest.mark.parametrize("show", [False, None], ids=["off", "no terminal"])
def test_no_bar_is_shown(show: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    with track(2, "editing", "edits", show) as advance:
        advance(2)
    assert capsys.readouterr().err == ""


def test_a_short_task_shows_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with track(2, "editing", "edits", show=True) as advance:
        advance(2)
    assert "editing" not in capsys.readouterr().err


def test_lines_tell_of_a_step_once(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    lines = Lines(told.append)
    for _ in range(2):
        with track(16_000, "second moments", "tokens", lines) as advance:
            advance(8_000)
    assert told == ["second moments: 16 000 tokens"]
    assert capsys.readouterr() == ("", "")


def test_lines_tell_of_a_long_step_every_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    clock = iter([0.0, 30.0, 61.0, 90.0, 122.0])
    monkeypatch.setattr("fastedit.runtime.progress.time.monotonic", lambda: next(clock))
    with track(2000, "editing", "edits", Lines(told.append)) as advance:
        for n in (100, 100, 0, 1100):
            advance(n)
    assert told == ["editing: 2 000 edits", "editing: 200 of 2 000 edits, 61 s", "editing: 1 300 of 2 000 edits, 122 s"]
