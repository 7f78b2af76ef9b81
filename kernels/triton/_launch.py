"""Shared by every launcher: Triton or its absence, whether tensors can be handed to it, the device that they are on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastedit.kernels import interpreted, missing

F = TypeVar("F", bound=Callable[..., object])

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:

    class _Absent:
        """Takes the place of Triton where it is not installed, so that the kernels' modules can still be imported."""

        @staticmethod
        def jit(function: F) -> F:
            """The function itself; `unavailable` keeps it from being launched."""
            return function

    triton = tl = _Absent()

INSTALLED = hasattr(triton, "__version__")

# Kernels are bound to the interpreter, or not, when their module is imported; so is this answer.
INTERPRETED = INSTALLED and interpreted()

SMALLEST_CAPABILITY = 80


def unavailable(args: NamedTuple) -> str | None:
    """Why Triton cannot run on the tensors of an argument record; None if it can.

    Triton may be installed where no device is, so the tensors' device and an active driver are checked."""
    tensors = {name: value for name, value in zip(args._fields, args, strict=True) if isinstance(value, Tensor)}
    devices = {name: value.device for name, value in tensors.items()}
    if len(set(devices.values())) > 1:
        return (
            f"the tensors are on several devices: {', '.join(f'{name} on {where}' for name, where in devices.items())}"
        )

    if INTERPRETED:
        return None
    if not INSTALLED:
        return missing()
    for name, value in tensors.items():
        if not value.is_cuda:
            return f"{name} is on {value.device}: Triton kernels run on CUDA devices, elsewhere with TRITON_INTERPRET=1"
    return driver_problem()


@functools.cache
def driver_problem() -> str | None:
    """Why no kernel can be launched in this process; None if they can."""
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError as error:
        return f"Triton has no active driver: {error}"
    if target.backend != "cuda":
        return f"the kernels are written for CUDA devices, Triton's driver is {target.backend}"
    if target.arch < SMALLEST_CAPABILITY:
        return f"the device's compute capability is {target.arch / 10}, the kernels need {SMALLEST_CAPABILITY / 10}"
    return None


def not_worth() -> str:
    """Why the automatic choice passes every Triton kernel over; a kernel that is requested by name runs."""
    if INTERPRETED:
        return "Triton's interpreter is for tests, not for speed"
    return "no Triton kernel has been timed on a GPU; it runs when requested by name"


def wrong_dtype(name: str, value: Tensor | None, *allowed: torch.dtype) -> str | None:
    """The reason why a tensor of another dtype is not taken; None for one of the allowed."""
    if value is None or value.dtype in allowed:
        return None
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    return f"{name} is {str(value.dtype).removeprefix('torch.')}, the kernel takes {wanted}"


def first(*reasons: str | None) -> str | None:
    """The first reason that is not None; None if there is none."""
    return next((reason for reason in reasons if reason is not None), None)


def on_device_of(value: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the tensor's device: Triton takes the current one, whatever device the pointers are of."""
    return torch.cuda.device(value.device) if value.is_cuda else contextlib.nullcontext()


def checked(index: Tensor, size: int) -> Tensor:
    """The index, unchanged. A number outside [0, size) is an IndexError; on a GPU it stops the device, as torch's own
    gathers do, and nothing waits for it."""
    return torch.arange(size, device=index.device).index_select(0, index)


def dtype_of(value: torch.dtype) -> tl.dtype:
    """The dtype of a kernel's sums: float64 for float64, else float32."""
    return tl.float64 if value == torch.float64 else tl.float32


def strides(value: Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides in elements; zeros for an argument not given."""
    return (0,) * rank if value is None else value.stride()


def cdiv(size: int, block: int) -> int:
    """The number of blocks that cover a size."""
    return -(-size // block)


def power_of_two(size: int, smallest: int, largest: int) -> int:
    """The smallest power of two that holds a size, within bounds that are powers of two."""
    return max(smallest, min(largest, 1 << max(size - 1, 0).bit_length()))
