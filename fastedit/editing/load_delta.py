"""Add an exported delta to a model. Needs torch alone; this file may be copied and used without fastedit."""

import json
import struct

import torch


def load_delta(model: torch.nn.Module, path: str) -> None:
    """Add `delta.safetensors` at `path` to the unedited model, in place. Raises KeyError for a model without the
    parameters it changes, RuntimeError for parameters of other shapes."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header, data = json.loads(file.read(size)), file.read()
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, about in header.items():
        if key != "__metadata__":
            name, _, part = key.rpartition("/")
            start, stop = about["data_offsets"]
            numbers = torch.frombuffer(bytearray(data[start:stop]), dtype=torch.float32)
            parts.setdefault(name, {})[part] = numbers.reshape(about["shape"])
    parameters = dict(model.named_parameters())
    for name, held in parts.items():
        weight = parameters[name]
        delta = held["delta"] if "delta" in held else held["left"] @ held["right"]
        weight.data = (weight.data.float() + delta.to(weight.device)).to(weight.dtype)
