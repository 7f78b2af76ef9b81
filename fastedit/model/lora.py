"""Models with LoRA adapters of PEFT: edited in the base weights, with the adapters on top.

PEFT puts a module around every layer that has an adapter. It computes W x + b + sum over active adapters of s B A x.
Whoever calls it gets all of that, so that keys, values and logits are those of the adapted model; what is edited is W.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastedit.model.families import UnsupportedModel

# The part of a parameter's name that PEFT puts in, and the beginnings of the names of its own parameters.
WRAPPED = ".base_layer."
OWN = ("lora_", "modules_to_save")

INSTEAD = "merge the adapter (merge_and_unload() of peft) and edit the model that this gives, or unload() it"


def unwrapped(model: Any) -> Any:
    """The model inside PEFT's `PeftModel`; any other model as it is.

    Raises UnsupportedModel for adapters that are not plain LoRA, that are merged into the weights or on the head, and
    for adapter layers in a model that no `PeftModel` is given for."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        return model

    if not is_wrapped(model):
        adapted = next((path for path, part in model.named_modules() if _is_of_peft(part)), None)
        if adapted is not None:
            raise UnsupportedModel(
                f"{name} has adapter layers in {adapted}: give the PeftModel around it, or {INSTEAD}"
            )
        return model

    wrapper: Any = model
    types = [config.peft_type for config in wrapper.peft_config.values()]
    kinds = sorted({str(getattr(kind, "value", kind)) for kind in types})
    if kinds != ["LORA"]:
        raise UnsupportedModel(
            f"{name} has an adapter of kind {', '.join(kinds)}, and only models with LoRA are edited with their"
            " adapter on; give the model inside, after unload() or merge_and_unload() where its kind has them"
        )

    base = wrapper.get_base_model()
    _check_layers(name, base)

    return base


def is_wrapped(model: Any) -> bool:
    """Whether a model is PEFT's wrapper around another."""
    return _is_of_peft(model) and hasattr(model, "get_base_model") and hasattr(model, "peft_config")


def _is_of_peft(part: Any) -> bool:
    return type(part).__module__.startswith("peft.")


def _check_layers(name: str, base: Any) -> None:
    """Raise UnsupportedModel for an adapter layer that does not add s B A x to what its layer gives."""
    head = base.get_output_embeddings()
    if head is not None and _is_of_peft(head):
        raise UnsupportedModel(f"{name} has an adapter on its head, whose weight is read without it; {INSTEAD}")

    for path, layer in _layers(base):
        if getattr(layer, "merged", False):
            raise UnsupportedModel(
                f"{name}: its adapter is merged into {path}: unmerge_adapter() takes it out again, or {INSTEAD}"
            )
        if getattr(layer, "lora_variant", None) or any(getattr(layer, "use_dora", {}).values()):
            raise UnsupportedModel(
                f"{name}: the adapter in {path} changes more than what it adds (DoRA and the like); {INSTEAD}"
            )


def _layers(base: Any) -> Iterator[tuple[str, Any]]:
    """The adapter layers inside a model, with their paths."""
    return ((path, part) for path, part in base.named_modules() if _is_of_peft(part) and hasattr(part, "base_layer"))


def without(module: Any) -> Any:
    """The layer inside an adapter layer; any other module as it is."""
    return module.base_layer if _is_of_peft(module) else module


def stored_name(name: str) -> str | None:
    """The name that a parameter has in the model without adapters; None for one of an adapter."""
    if any(part.startswith(OWN) for part in name.split(".")):
        return None

    return name.replace(WRAPPED, ".")


def added(module: Any) -> Tensor | None:
    """What active adapters add to the weight of a layer, in the layout in which it is stored; None without any."""
    if not _is_of_peft(module) or module.disable_adapters:
        return None

    parts = [module.get_delta_weight(name) for name in module.active_adapters if name in module.lora_A]

    return None if not parts else sum(parts[1:], parts[0])


def describe(module: nn.Module) -> str:
    """Which adapters of a module count, and how much: what no parameter says. "" without any."""
    told = [
        f"{path} {layer.disable_adapters} {layer.active_adapters} {sorted(layer.scaling.items())}"
        for path, layer in _layers(module)
    ]

    return hashlib.sha256("\n".join(told).encode()).hexdigest() if told else ""


def save_adapters(model: Any, folder: Path) -> None:
    """Write the adapters of a `PeftModel` as PEFT reads them, into an empty or absent folder."""
    model.save_pretrained(str(folder))
