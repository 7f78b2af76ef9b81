"""Writing a batch when memory runs short, and what was warned of while it was written."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import torch

from fastedit.config import EditConfig

log = logging.getLogger(__name__)

T = TypeVar("T")

# Live rows below which a lack of memory is not mended by regrouping.
SMALLEST_BUDGET = 16


def with_less_memory(write: Callable[[EditConfig], T], config: EditConfig) -> T:
    """write(config), and again with half the token budget of its values each time memory runs out; each is a warning.

    write must leave nothing behind when it raises. The last lack of memory is raised when the budget is at its
    smallest."""
    while True:
        budget = config.value.token_budget
        try:
            return write(config)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or budget <= SMALLEST_BUDGET:
                raise
        config = with_budget(config, max(SMALLEST_BUDGET, budget // 2))
        log.warning("out of memory: trying again with a token budget of %d, was %d", budget // 2, budget)


def with_budget(config: EditConfig, budget: int | None) -> EditConfig:
    """The config with another token budget for its values; None = as it is."""
    if budget is None:
        return config
    return config.model_copy(update={"value": config.value.model_copy(update={"token_budget": budget})})


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a lack of memory, on a GPU or (where torch has no type of its own for it) on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


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
