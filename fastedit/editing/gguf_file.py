"""The edited model as a GGUF file: the file it came from, with the edited tensors in place of the old ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastedit.runtime.places import NotSaved

# Fields that the reader makes up, and the one that the writer writes by itself.
NOT_COPIED = ("GGUF.", "general.architecture")


def tensor_name(layer: int) -> str:
    """The name of a layer's down-projection in a GGUF file."""
    return f"blk.{layer}.ffn_down.weight"


def write_gguf(source: Path, path: Path, weights: Mapping[int, Tensor]) -> None:
    """Write a copy of a GGUF file with other down-projections, read it back and compare.

    source: the file
    weights: layer -> (d_model, d_ff) float32 or float16, stored as such
    Raises NotSaved for a file that holds something else, and ValueError for a source without the tensors."""
    import gguf

    reader = gguf.GGUFReader(source)
    replaced = {tensor_name(layer): weight.cpu().contiguous().numpy() for layer, weight in weights.items()}
    _check_shapes(source, reader, replaced)

    writer = gguf.GGUFWriter(path, _contents(reader, "general.architecture"), endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    try:
        _copy_fields(writer, reader)
        _write_tensors(writer, reader, replaced)
    finally:
        writer.close()

    _compare(reader, gguf.GGUFReader(path), replaced)


def base_model(source: Path) -> str | None:
    """The hub id of the model that a GGUF file was made of, as its metadata say; None where they do not."""
    import gguf

    reader = gguf.GGUFReader(source)
    repository = _contents(reader, "general.source.huggingface.repository")
    url = _contents(reader, "general.source.repo_url") or _contents(reader, "general.base_model.0.repo_url")
    if repository is None and url is not None and "huggingface.co/" in url:
        repository = url.partition("huggingface.co/")[2].strip("/")

    return repository


def _contents(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _check_shapes(source: Path, reader: Any, replaced: Mapping[str, np.ndarray[Any, Any]]) -> None:
    # A GGUF file names the shortest stride first.
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}

    for name, weight in replaced.items():
        if shapes.get(name) != weight.shape:
            raise ValueError(f"{source}: {name} is {shapes.get(name)}, and the edited weight {weight.shape}")


def _copy_fields(writer: Any, reader: Any) -> None:
    import gguf

    for field in reader.fields.values():
        if field.name.startswith(NOT_COPIED):
            continue

        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)


def _write_tensors(writer: Any, reader: Any, replaced: Mapping[str, np.ndarray[Any, Any]]) -> None:
    for tensor in reader.tensors:
        data = replaced.get(tensor.name, tensor.data)
        kind = None if tensor.name in replaced else tensor.tensor_type
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, kind)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    for tensor in reader.tensors:
        if tensor.name in replaced:
            writer.write_tensor_data(replaced[tensor.name])
        else:
            writer.write_tensor_data(tensor.data, tensor_endianess=reader.endianess)


def _compare(source: Any, written: Any, replaced: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Raise NotSaved unless a file holds the source's fields and tensors, bit for bit, but for the replaced ones."""
    for name, field in source.fields.items():
        found = written.fields.get(name)
        if found is None or not _equal(field.parts, found.parts):
            raise NotSaved(f"{name} is not in the file as it is in the source; nothing was kept")

    stored = {tensor.name: tensor for tensor in written.tensors}
    for tensor in source.tensors:
        wanted = replaced.get(tensor.name, tensor.data)
        found = stored.get(tensor.name)
        if found is None or found.data.dtype != wanted.dtype or not np.array_equal(_bytes(found.data), _bytes(wanted)):
            raise NotSaved(f"{tensor.name} is not in the file as it was written; nothing was kept, try again")


def _equal(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(_bytes(a), _bytes(b)) for a, b in zip(left, right, strict=True)
    )


def _bytes(array: Any) -> Any:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
