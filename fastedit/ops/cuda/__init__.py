"""Launchers of the CUDA kernels in csrc/, one file per op; the compiled module is `fastedit._cuda`.

They enqueue on torch's current stream of the tensors' device. They wait for it only where the size of a result is known
to the device alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4, torch.bool: 5}

# The oldest architecture that is compiled for.
SMALLEST_CAPABILITY = (8, 0)

# A kernel's arguments as csrc/bindings_cuda.cpp has them: numbers, addresses, and tuples of them.
Argument = int | float | tuple["Argument", ...]


@cache
def missing() -> str | None:
    """Why no CUDA kernel can run in this process; None if they can."""
    if find_spec("fastedit._cuda") is None:
        return "fastedit._cuda was not compiled (fastedit doctor says why)"
    problem: str | None = compiled().problem()
    return None if problem is None else f"CUDA has no device here: {problem}"


@cache
def compiled() -> ModuleType:
    """The module `fastedit._cuda`; an import error propagates."""
    return importlib.import_module("fastedit._cuda")


def cannot(*values: Tensor | None, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    if missing() is not None:
        return missing()

    for value in values:
        if value is None:
            continue
        if not value.is_cuda:
            return f"the CUDA kernels run on CUDA devices, got a tensor on {value.device}"
        if value.dtype not in dtypes:
            return f"the CUDA kernel takes {' or '.join(map(str, dtypes))}, got {value.dtype}"
        if max(value.shape, default=0) >= 2**31:
            return f"the CUDA kernel counts to 2^31, got {tuple(value.shape)}"

    return next(filter(None, (_too_old(value.device) for value in values if value is not None)), None)


@cache
def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= SMALLEST_CAPABILITY:
        return None
    return (
        f"the kernels are compiled for compute capability 8.0 and newer, {device} has {'.'.join(map(str, capability))}"
    )


def unmeasured() -> str:
    """The answer of `worth` for a kernel that no GPU has timed yet."""
    return "not yet timed on a GPU"


def operand(value: Tensor | None, rank: int) -> tuple[int, ...]:
    """A tensor of `rank` dimensions as a kernel takes it: address (0 for None), type, strides in elements."""
    if value is None:
        return (0,) * (rank + 2)
    return (value.data_ptr(), TYPES[value.dtype], *value.stride())


def launch(op: str, like: Tensor, *arguments: Argument) -> None:
    """Enqueue a kernel of the module on the stream of a tensor's device.

    Raises RuntimeError with CUDA's message when it cannot be launched."""
    kernel: Callable[..., str | None] = getattr(compiled(), op)
    with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
        error = kernel(*arguments, stream_of(like.device))
    if error is not None:
        raise RuntimeError(f"{op}: {error}")


def stream_of(device: torch.device) -> int:
    """The address of torch's current stream of a device."""
    return int(torch.cuda.current_stream(device).cuda_stream)
