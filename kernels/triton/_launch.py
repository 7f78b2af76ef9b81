"""Around every kernel here: Triton or its absence, whether tensors can be handed to it, the device they lie on."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:

    class _Absent:
        """Stands where Triton is not installed, so that the modules can be imported and say so."""

        @staticmethod
        def jit(function: Any) -> Any:
            """The function itself; `unavailable` keeps it from being launched."""
            return function

    triton = tl = _Absent()

INSTALLED = hasattr(triton, "__version__")

# Kernels are bound to the interpreter, or not, when their module is imported; so is this answer.
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

SMALLEST_CAPABILITY = 80


def unavailable(**tensors: Tensor | None) -> str | None:
    """Why Triton cannot run on these tensors (name = tensor, None = argument not given), or None if it can.

    Triton may be installed where no device is, so the tensors' device and an active driver are asked for."""
    if not INSTALLED or INTERPRETED:
        return missing()
    for name, value in tensors.items():
        if value is not None and not value.is_cuda:
            return f"{name} is on {value.device}: Triton kernels run on CUDA devices, elsewhere with TRITON_INTERPRET=1"
    return driver_problem()


def missing() -> str | None:
    """Why no Triton kernel can run in this process, whatever it is given, or None."""
    if not INSTALLED:
        return "Triton is not installed"
    if INTERPRETED:
        return None
    return driver_problem() if torch.cuda.is_available() else "there is no CUDA device"


@functools.cache
def driver_problem() -> str | None:
    """Why no kernel can be launched in this process, or None."""
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError as error:
        return f"Triton has no active driver: {error}"
    if target.backend != "cuda":
        return f"the kernels are written for CUDA devices, Triton's driver is {target.backend}"
    if target.arch < SMALLEST_CAPABILITY:
        return f"the device's compute capability is {target.arch / 10}, the kernels need {SMALLEST_CAPABILITY / 10}"
    return None


def not_worth() -> str | None:
    """Why Triton is not the faster choice anywhere in this process, or None."""
    return "Triton's interpreter is for tests, not for speed" if INTERPRETED else None


def wrong_dtype(name: str, value: Tensor | None, *allowed: torch.dtype) -> str | None:
    """The reason that a tensor of another dtype gives, or None."""
    if value is None or value.dtype in allowed:
        return None
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    return f"{name} is {str(value.dtype).removeprefix('torch.')}, the kernel takes {wanted}"


def first(*reasons: str | None) -> str | None:
    """The first reason there is, None if there is none."""
    return next((reason for reason in reasons if reason is not None), None)


def on_device_of(value: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the tensor's device: Triton takes the current one, whatever device the pointers are of."""
    return torch.cuda.device(value.device) if value.is_cuda else contextlib.nullcontext()


def checked(index: Tensor, size: int) -> Tensor:
    """The index, unchanged. A number outside [0, size) is an IndexError, or on a GPU stops the device as torch's own
    gathers do; nothing waits for it."""
    return torch.arange(size, device=index.device).index_select(0, index)


def strides(value: Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides in elements; zeros for an argument not given."""
    return (0,) * rank if value is None else value.stride()


def cdiv(size: int, block: int) -> int:
    """The number of blocks that cover a size."""
    return -(-size // block)


def power_of_two(size: int, smallest: int, largest: int) -> int:
    """The smallest power of two that holds a size, within bounds that are powers of two."""
    return max(smallest, min(largest, 1 << max(size - 1, 0).bit_length()))
