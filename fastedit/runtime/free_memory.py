"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back_freed() -> None:
    """Return what was freed to the system, where the C library can (glibc; nothing happens elsewhere).

    glibc takes a large block from the system until the first one of its size is freed, and from its heap afterwards.
    The blocks of a batch differ in size from those of the batch before, leave gaps that fit nothing, and the resident
    memory of a stream grows from batch to batch although no tensor is kept."""
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
