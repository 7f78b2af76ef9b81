"""Add an exported delta to a model. Needs torch alone; this file may be copied and used without fastedit."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import struct
import warnings

import torch


def load_delta(model: torch.nn.Module, path: str, any_base: bool = False) -> None:
    """Add `delta.safetensors` at `path` to the unedited model, in place.

    any_base: also to other weights than the unedited ones; adding it twice goes unnoticed then
    Everything is checked before a weight is written. Raises ValueError for a damaged file, KeyError for a model without
    the parameters, and RuntimeError for parameters of other shapes, and for weights that are not those the delta was
    exported for, which also holds once it was added."""
    parts, about = _read(path)
    parameters = dict(model.named_parameters())

    deltas = {}
    for name, held in parts.items():
        if name not in parameters:
            raise KeyError(f"{path}: the model has no parameter {name!r}, of {len(parameters)}")
        weight = parameters[name].data

        delta = _delta(path, name, held)
        if delta.shape != weight.shape or not weight.is_floating_point():
            raise RuntimeError(
                f"{path}: {name} must be {tuple(delta.shape)} numbers, is {tuple(weight.shape)} {weight.dtype}"
            )

        base = json.loads(about.get("base_sha256", "{}")).get(name)
        if base is not None and not any_base and base.get(str(weight.dtype)) != checksum({name: weight}):
            raise RuntimeError(
                f"{path}: {name} is not the unedited weight that this delta was exported for: another model, another"
                " dtype, or the delta was added already (any_base=True adds it all the same)"
            )
        deltas[name] = delta

    for name, delta in deltas.items():
        weight = parameters[name]
        weight.data = (weight.data.float() + delta.to(weight.device)).to(weight.dtype)


def checksum(tensors: dict[str, torch.Tensor], about: dict[str, str] | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, and over the metadata `about`, hexadecimal."""
    digest = hashlib.sha256(json.dumps(about or {}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size()))
    return digest.hexdigest()


def _read(path: str) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Parameter -> part -> tensor, and the file's metadata. Raises ValueError for a damaged file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        data = file.read()

    tensors = {}
    try:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        about = header.pop("__metadata__", {})
        for key, place in header.items():
            if place["dtype"] != "F32":
                raise ValueError(f"{key} has dtype {place['dtype']}")
            start, stop = (8 + size + at for at in place["data_offsets"])
            numbers = torch.frombuffer(bytearray(data[start:stop]), dtype=torch.float32)
            tensors[key] = numbers.reshape(place["shape"])
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: is no delta, or damaged ({error}); export it again") from None

    # Of any key: a checksum whose name was damaged must not pass for a file without one.
    written = {name: text for name, text in about.items() if name != "sha256"}
    if about != {"format": "pt"} and about.get("sha256") != checksum(tensors, written):
        raise ValueError(f"{path}: its bytes are not those that were written (checksum differs); export it again")
    if "sha256" not in about:
        warnings.warn(f"{path}: an earlier version wrote it, without checksums", stacklevel=3)

    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        parts.setdefault(name, {})[part] = tensor
    return parts, about


def _delta(path: str, name: str, held: dict[str, torch.Tensor]) -> torch.Tensor:
    """The change of one parameter. Raises ValueError for parts that make none, or numbers that are not finite."""
    if set(held) not in ({"delta"}, {"left", "right"}):
        raise ValueError(f"{path}: {name} must have a delta, or left and right, has {', '.join(sorted(held))}")
    if "left" in held and (held["left"].dim() != 2 or held["left"].shape[1:] != held["right"].shape[:1]):
        raise ValueError(f"{path}: the factors of {name} do not fit: {[tuple(part.shape) for part in held.values()]}")

    delta = held["delta"] if "delta" in held else held["left"] @ held["right"]
    if not bool(delta.isfinite().all()):
        raise ValueError(f"{path}: the delta of {name} is not finite")
    return delta
