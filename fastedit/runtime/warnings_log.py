"""Collects the warnings that fastedit logs, so that reports can carry them."""

from __future__ import annotations

import logging
import threading
from types import TracebackType


class Notes(logging.Handler):
    """Collects the warnings that fastedit logs from this thread inside the `with` block.

    lines: the messages in order, each once"""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Add the message of a record to `lines`, unless it is there or comes from another thread."""
        line = record.getMessage()

        if record.thread == self._thread and line not in self.lines:
            self.lines.append(line)

    def __enter__(self) -> Notes:
        logging.getLogger("fastedit").addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger("fastedit").removeHandler(self)
