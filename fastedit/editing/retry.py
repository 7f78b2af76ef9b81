"""Writing a batch when memory runs short, and what was warned of while it was written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from fastedit.config import EditConfig

log = logging.getLogger(__name__)

T = TypeVar("T")

# Rows below which a lack of memory is not mended by regrouping.
SMALLEST_BUDGET = 16


def with_less_memory(write: Callable[[EditConfig], T], config: EditConfig) -> tuple[T, EditConfig]:
    """write(config), and again with half the token budget each time memory runs out, with a warning; the config it was
    written with.

    write must leave nothing behind when it raises. The last lack of memory is raised when the budget is at its
    smallest, or there is none."""
    while True:
        budget = token_budget(config)
        try:
            return write(config), config
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or budget is None or budget <= SMALLEST_BUDGET:
                raise
        config = with_budget(config, max(SMALLEST_BUDGET, budget // 2))
        log.warning("out of memory: trying again with a token budget of %d, was %d", token_budget(config), budget)


def token_budget(config: EditConfig) -> int | None:
    """Rows that are optimised together: values, or columns. None for a method that optimises nothing."""
    part = _optimised(config)
    return None if part is None else getattr(config, part).token_budget


def with_budget(config: EditConfig, budget: int | None) -> EditConfig:
    """The config with another token budget; None = as it is."""
    part = _optimised(config)
    if part is None or budget is None:
        return config
    return config.model_copy(update={part: getattr(config, part).model_copy(update={"token_budget": budget})})


def _optimised(config: EditConfig) -> str | None:
    return next((part for part in ("value", "train") if hasattr(config, part)), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a lack of memory, on a GPU or (where torch has no type of its own for it) on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
