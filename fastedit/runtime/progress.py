"""One progress bar: items per second and time left, on a terminal only, after two seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

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

SHOW_AFTER_S = 2.0


class _RateColumn(TextColumn):
    """Items per second over the whole task: rich's own speed forgets the past, and our steps are coarse."""

    def __init__(self, unit: str) -> None:
        super().__init__("")
        self._unit = unit

    def render(self, task: Task) -> Text:
        elapsed = task.elapsed or 0.0
        rate = task.completed / elapsed if elapsed > 0 else 0.0
        return Text(f"{rate:.2f} {self._unit}/s" if rate < 100 else f"{rate:,.0f} {self._unit}/s")


@contextlib.contextmanager
def track(total: int, label: str, unit: str, show: bool | None = None) -> Iterator[Callable[[float], None]]:
    """Yields advance(n). show: None = when the error stream is a terminal."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda n: None
        return
    from rich.console import Console

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
