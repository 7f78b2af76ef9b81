"""One wording for wrong arguments of ops: the op, the argument, what it must be and what it was."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor


def require_dtype(op: str, name: str, value: Tensor, *allowed: torch.dtype) -> None:
    """Raise TypeError unless the tensor has one of the allowed dtypes."""
    if value.dtype not in allowed:
        wanted = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{op}: {name} must be {wanted}, got {value.dtype}")


def require_float(op: str, name: str, value: Tensor) -> None:
    """Raise TypeError unless the tensor has a real floating-point dtype."""
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating-point, got {value.dtype}")


def require(op: str, name: str, value: Tensor, shape: Sequence[int | None], like: Tensor | None = None) -> None:
    """Check a tensor's shape (None = any size) and, with `like`, its dtype.

    Raises ValueError for the shape, TypeError for the dtype.
    """
    if value.shape != shape and not _fits(value.shape, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} must be ({wanted}), got {tuple(value.shape)}")

    if like is not None and value.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must be {like.dtype}, got {value.dtype}")


def require_one_device(op: str, args: NamedTuple) -> None:
    """Raise ValueError unless all tensors of an argument record are on the device of the first."""
    if (reason := apart(args)) is not None:
        raise ValueError(f"{op}: {reason}")


def apart(args: NamedTuple) -> str | None:
    """Which tensor of an argument record is not on the device of the first; None if all are."""
    device = None
    for value in args:
        if isinstance(value, Tensor):
            if device is None:
                device = value.device
            elif value.device != device:
                return _names_apart(args)
    return None


def require_in_range(op: str, name: str, index: Tensor, size: int) -> None:
    """Raise IndexError for a number outside of [0, size) in an index on the CPU.

    Elsewhere the check would wait for the device, which stops at such a number in `index_select`. Fake tensors have no
    numbers."""
    if type(index) is not Tensor or index.device.type != "cpu" or index.numel() == 0:
        return
    smallest, largest = (int(end) for end in index.aminmax())
    if smallest < 0 or largest >= size:
        raise IndexError(f"{op}: {name} must be in [0, {size}), got {smallest} to {largest}")


def require_writable(op: str, args: NamedTuple, *names: str) -> None:
    """Raise ValueError unless the named tensors (some may be None) can be written in place, element by element."""
    for name in names:
        value = getattr(args, name)
        # Most are contiguous, so that no element can share memory with another.
        if value is None or (value.is_contiguous() and not lazy(value) and not value.is_inference()):
            continue
        if lazy(value):
            raise ValueError(
                f"{op}: {name} is written in place, got a lazily negated or zero tensor: pass its .clone()"
            )
        if value.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{op}: {name} is written in place, got a tensor made in inference mode: pass its .clone()"
            )
        if _overlaps(value):
            shown = f"strides {value.stride()} of {tuple(value.shape)}"
            raise ValueError(f"{op}: {name} is written in place, got elements that share memory, {shown}: clone it")


def lazy(value: Tensor) -> bool:
    """Whether the memory of a tensor does not hold its elements: torch negates them when they are read, or has none."""
    return value.is_neg() or value._is_zerotensor()


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    if len(shape) != len(wanted):
        return False
    # A loop, not `all` over a generator: an op has a few microseconds for all of its checks.
    for size, want in zip(shape, wanted, strict=True):  # noqa: SIM110
        if want is not None and want != size:
            return False
    return True


def _names_apart(args: NamedTuple) -> str:
    tensors = [(name, value) for name, value in zip(args._fields, args, strict=True) if isinstance(value, Tensor)]
    first, other = tensors[0], next(pair for pair in tensors if pair[1].device != tensors[0][1].device)
    return f"{other[0]} must be on {first[1].device}, the device of {first[0]}, got {other[1].device}"


def _overlaps(value: Tensor) -> bool:
    """Whether two elements of a matrix share memory: row and column strides have a common multiple inside of it."""
    (rows, columns), (down, along) = value.shape, value.stride()
    if rows * columns <= 1:
        return False
    common = gcd(down, along)
    return common == 0 or (along // common < rows and down // common < columns)
