"""How far a long step is: a bar on a terminal, or lines of text for whoever keeps the error stream in a file.

A bar has items per second and time left. It is shown on a terminal only, after two seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fastedit.runtime.words import grouped

SHOW_AFTER_S = 2.0
LINE_EVERY_S = 60.0


class _RateColumn(TextColumn):
    """Items per second since the task began. rich's own speed covers recent steps only, and ours are few and long."""

    def __init__(self, unit: str) -> None:
        super().__init__("")
        self._unit = unit

    def render(self, task: Task) -> Text:
        elapsed = task.elapsed or 0.0
        rate = task.completed / elapsed if elapsed > 0 else 0.0
        number = f"{rate:.2f}" if rate < 100 else f"{rate:,.0f}"

        return Text(f"{number} {self._unit}/s")


class Lines:
    """Progress as lines of text: one when a step begins, and one every minute while it lasts.

    write: called with each line, which has no line break"""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write
        self._begun: set[str] = set()

    @contextlib.contextmanager
    def track(self, total: int, label: str, unit: str) -> Iterator[Callable[[float], None]]:
        """As the function `track`. A step that begins again and again, such as a measurement, is told once."""
        beginning = f"{label}: {grouped(total)} {unit if total != 1 else unit.removesuffix('s')}"
        if beginning not in self._begun:
            self._begun.add(beginning)
            self.write(beginning)

        started = told = time.monotonic()
        done = 0.0

        def advance(n: float) -> None:
            nonlocal done, told
            done += n

            now = time.monotonic()
            if now - told >= LINE_EVERY_S:
                told = now
                self.write(f"{label}: {grouped(done)} of {grouped(total)} {unit}, {now - started:.0f} s")

        yield advance


# Whether bars are shown, None = on a terminal; or what takes lines of text in their place.
Show: TypeAlias = bool | Lines | None


def tell(show: Show, line: str) -> None:
    """Write a line where progress is shown: to whoever takes lines, else to the error stream.

    show: as for `track`; None = only if the error stream is a terminal"""
    if isinstance(show, Lines):
        show.write(line)
    elif sys.stderr.isatty() if show is None else show:
        Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def track(total: int, label: str, unit: str, show: Show = None) -> Iterator[Callable[[float], None]]:
    """Show a progress bar on the error stream while the `with` block runs.

    total: number of items; label, unit: texts of the bar, the unit in the plural
    show: whether to show the bar, None = only if the error stream is a terminal; `Lines` gets text in its place
    Yields a function that is called with the number of items finished since its last call."""
    if isinstance(show, Lines):
        with show.track(total, label, unit) as advance_lines:
            yield advance_lines
        return

    if not (sys.stderr.isatty() if show is None else show):
        yield lambda n: None
        return

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = progress.add_task(label, total=total)
    started = time.monotonic()

    def advance(n: float) -> None:
        progress.advance(task, n)

        if time.monotonic() - started > SHOW_AFTER_S and not progress.live.is_started:
            progress.start()

    try:
        yield advance
    finally:
        progress.stop()
