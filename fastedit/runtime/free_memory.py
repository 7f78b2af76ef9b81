"""Lack of memory: how it is told from other errors, and how freed memory goes back to the operating system."""

from __future__ import annotations

import ctypes
import sys

import torch


def give_back_freed() -> None:
    """Return freed memory to the operating system. Only glibc offers this; elsewhere the function does nothing.

    Once a large block has been freed, glibc serves later blocks of that size from its own heap. Each batch needs
    blocks of other sizes and leaves gaps that the next batch cannot use, so without this call the resident memory of
    a stream grows from batch to batch although no tensor is kept."""
    if not sys.platform.startswith("linux"):
        return

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a lack of memory: on a GPU, or on the CPU, for which torch has no error type of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
