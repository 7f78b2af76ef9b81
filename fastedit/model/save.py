"""Writes a model and its tokenizer as transformers reads them, and reads the tokenizer again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastedit.model.adapter import ModelAdapter
from fastedit.model.load import quiet_transformers, read_tokenizer_of
from fastedit.model.lora import save_adapters

# Folder beside the base weights for the adapters on them, which PEFT reads.
ADAPTERS = "adapter"


def write_model(adapter: ModelAdapter, folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_size: str) -> None:
    """Write a model with these tensors in place of its own, and its tokenizer, as `load_model` reads them.

    tensors: by the names of the model's state dict. The model is not changed, nor is its config."""
    model = adapter.model
    config = {name: getattr(model.config, name, None) for name in ("dtype", "architectures")}

    with quiet_transformers(), _writable_generation(model, folder):
        try:
            model.save_pretrained(folder, state_dict=dict(tensors), max_shard_size=max_shard_size)
            adapter.tokenizer.save_pretrained(folder)
            if adapter.has_adapters:
                save_adapters(adapter.given, folder / ADAPTERS)
        finally:
            for name, value in config.items():
                setattr(model.config, name, value)


@contextlib.contextmanager
def _writable_generation(model: Any, folder: Path) -> Iterator[None]:
    """transformers saves no model with settings of generation that contradict one another, as some checkpoints have.

    They are written as they were read."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        yield
        return

    model.generation_config = type(settings)()
    try:
        yield
    finally:
        model.generation_config = settings

    settings.to_json_file(folder / "generation_config.json")


def read_tokenizer(place: str) -> Any:
    """The tokenizer of a folder. Raises ModelNotFound, and what transformers raises for files that it cannot read."""
    with quiet_transformers() as transformers:
        return read_tokenizer_of(transformers, place, {})
