"""One wording for wrong arguments of ops: the op, the argument, what it must be and what it was."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def require_dtype(op: str, name: str, value: Tensor, *allowed: torch.dtype) -> None:
    """Raise TypeError unless the tensor has one of the allowed dtypes."""
    if value.dtype not in allowed:
        wanted = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{op}: {name} must be {wanted}, got {value.dtype}")


def require(op: str, name: str, value: Tensor, shape: Sequence[int | None], like: Tensor | None = None) -> None:
    """Check a tensor's shape (None = any size) and, with `like`, its dtype and device.

    Raises ValueError for shape or device, TypeError for dtype.
    """
    fits = value.dim() == len(shape) and all(
        size is None or size == got for size, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} must be ({wanted}), got {tuple(value.shape)}")

    if like is not None and value.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must be {like.dtype}, got {value.dtype}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {value.device}")
