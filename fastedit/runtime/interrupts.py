"""Ctrl-C while batches are written: it comes between two of them, never inside one."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType

log = logging.getLogger(__name__)


class Interrupts:
    """Inside the `with` block the first Ctrl-C asks to stop after the batch at work, the second to abandon it.

    Nothing is raised out of the blue, where a rollback or a commit could be cut in half: whoever works calls `check`
    where a batch may be abandoned, and asks `wanted` after each. Where Python's own handler for Ctrl-C is not in force
    (another thread than the main one, a program with a handler of its own) nothing is changed."""

    def __init__(self) -> None:
        self._count = 0
        self._is_ours = False

    @property
    def wanted(self) -> bool:
        """Whether to stop after this batch."""
        return self._count > 0

    def check(self) -> None:
        """Raise KeyboardInterrupt if the batch at work is to be abandoned."""
        if self._count > 1:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._is_ours = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._is_ours = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        then = "stopping after this batch; once more to abandon it" if self._count == 1 else "abandoning this batch"
        log.warning("interrupted: %s", then)
