"""Ctrl-C while batches are written: the first stops the stream after the current batch, the second abandons it."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType

log = logging.getLogger(__name__)


class Interrupts:
    """Inside the `with` block, the first Ctrl-C requests a stop after the current batch, the second abandons the batch.

    The signal handler only counts, so that no commit or rollback is cut in half. The editor calls `check` wherever a
    batch may be abandoned and reads `stop_requested` after each batch. The handler is installed only in the main
    thread and only if Python's default handler for Ctrl-C is active; a program with a handler of its own keeps it."""

    def __init__(self) -> None:
        self._count = 0
        self._is_ours = False

    @property
    def stop_requested(self) -> bool:
        """Whether a stop after the current batch was requested."""
        return self._count > 0

    def check(self) -> None:
        """Raise KeyboardInterrupt if the current batch is to be abandoned."""
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

        if self._count == 1:
            reaction = "stopping after this batch; once more to abandon it"
        else:
            reaction = "abandoning this batch"

        log.warning("interrupted: %s", reaction)
