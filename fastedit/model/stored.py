"""A checkpoint as it lies on the disk: where, and in which dtypes."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open

from fastedit.model.adapter import StoredModel

# As the heads of safetensors files name them.
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored_model(place: str, otherwise: torch.dtype) -> StoredModel:
    """The dtypes of a checkpoint's tensors, read from the heads of its safetensors files.

    place: a folder, hub id, or GGUF file, whose tensors count as float32
    otherwise: the dtype of a checkpoint in other files"""
    if place.endswith(".gguf"):
        return StoredModel(place, torch.float32, {})

    dtypes: dict[str, torch.dtype] = {}
    sizes: dict[torch.dtype, int] = {}
    for file in sorted(_checkpoint_folder(place).glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (no dict)
                head = stored.get_slice(name)
                if (dtype := STORED_DTYPES.get(head.get_dtype())) is not None:
                    dtypes[name] = dtype
                    sizes[dtype] = sizes.get(dtype, 0) + math.prod(head.get_shape())

    main = max(sizes, key=lambda dtype: sizes[dtype], default=otherwise)
    return StoredModel(place, main, {name: dtype for name, dtype in dtypes.items() if dtype != main})


def _checkpoint_folder(place: str) -> Path:
    """The folder of a checkpoint's files: for a hub id where they were put when it was loaded."""
    if Path(place).is_dir():
        return Path(place)

    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(place, "config.json")
    return Path(config).parent if isinstance(config, str) else Path(place)
