"""Collects the warnings that fastedit logs while something is done."""

from __future__ import annotations

import logging
import threading
from types import TracebackType


class Notes(logging.Handler):
    """Inside the `with` block, the warnings that fastedit logs from this thread: `lines`, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a message in."""
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
