"""Hashes of tensors, and a canonical text form of settings and records."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def canonical(data: Any) -> str:
    """`data` as JSON text that is the same for equal data: ASCII, names sorted, NaN and infinities as strings.

    data: mappings, lists, tuples, strings, numbers, booleans and None. Raises TypeError for other types."""
    return json.dumps(plain(data), sort_keys=True, separators=(",", ":"), allow_nan=False)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of the tensors, hexadecimal. Their order does not matter."""
    digest = hashlib.sha256()

    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))

    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, as a buffer that hashes and files accept.

    Copied only when the tensor is on another device or not contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def plain(value: Any) -> Any:
    """The value in types that JSON has, with numbers that are not finite as strings."""
    if isinstance(value, Mapping):
        return {str(name): plain(member) for name, member in value.items()}

    if isinstance(value, (list, tuple)):
        return [plain(member) for member in value]

    if isinstance(value, float) and not math.isfinite(value):
        return str(value)

    return value
