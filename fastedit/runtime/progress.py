"""A progress bar with items per second and time left. It is shown on a terminal only, after two seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

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

SHOW_AFTER_S = 2.0


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


@contextlib.contextmanager
def track(total: int, label: str, unit: str, show: bool | None = None) -> Iterator[Callable[[float], None]]:
    """Show a progress bar on the error stream while the `with` block runs.

    total: number of items; label, unit: texts of the bar, the unit in the plural
    show: whether to show the bar; None = only if the error stream is a terminal
    Yields a function that is called with the number of items finished since its last call."""
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
