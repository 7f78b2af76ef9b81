"""Writing a batch when memory runs short: once more, with half the rows at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from fastedit.runtime.free_memory import is_out_of_memory

log = logging.getLogger(__name__)

T = TypeVar("T")

# With fewer rows than this, a smaller budget no longer saves memory.
SMALLEST_BUDGET = 16


def with_less_memory(write: Callable[[int | None], T], budget: int | None) -> tuple[T, int | None]:
    """`write(budget)`, and again with half the token budget each time memory runs out; the result and its budget.

    write: must leave nothing behind when it raises
    budget: rows optimised together; None = the method optimises nothing
    The last out-of-memory error is raised when there is no budget, or none smaller."""
    while True:
        try:
            return write(budget), budget
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or budget is None or budget <= SMALLEST_BUDGET:
                raise

        smaller = max(SMALLEST_BUDGET, budget // 2)
        log.warning("out of memory: trying again with a token budget of %d, was %d", smaller, budget)
        budget = smaller
