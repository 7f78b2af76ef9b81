"""Presets, which ship as data beside their methods, and the settings that an editor starts from.

A preset is a YAML file `<package>/presets/<method>/<name>.yaml`: `origin` says where its numbers come from, `model` is
the shape it was made for, `config` the fields of the method's config; an unknown field is an error naming it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastedit.config import EditConfig, changed
from fastedit.methods.base import AnyMethod
from fastedit.methods.registry import method_named
from fastedit.model.adapter import ModelAdapter


def presets(method: str | AnyMethod) -> list[str]:
    """Names of the presets that ship for a method. Raises ValueError for an unknown method."""
    folder = method_named(method).presets
    return [] if folder is None else sorted(path.stem for path in folder.glob("*.yaml"))


def load_preset(method: str | AnyMethod, name: str, **changes: Any) -> EditConfig:
    """The preset `name` of a method with `changes` applied, see `fastedit.config.changed`.

    Raises ValueError for an unknown method, an unknown preset (listing those that ship) or a value that does not fit.
    """
    method = method_named(method)
    if name not in presets(method):
        names = ", ".join(presets(method)) or "none"
        raise ValueError(f"{method.name}: no preset {name!r}; there are {names}")

    return changed(method.config_class.model_validate(_read(method, name)["config"]), changes)


def preset_for(method: str | AnyMethod, n_layers: int, d_model: int, d_ff: int) -> EditConfig:
    """The preset that was made for a model of this shape. Raises ValueError, listing the presets, when none was."""
    method = method_named(method)
    shape = {"n_layers": n_layers, "d_model": d_model, "d_ff": d_ff}
    for name in presets(method):
        if _read(method, name)["model"] == shape:
            return load_preset(method, name)

    advice = "pass config="
    if presets(method):
        advice += f" or preset= one of {', '.join(presets(method))}"
    raise ValueError(f"{method.name}: no preset was made for a model of {shape}; {advice}")


def settings_for(
    method: AnyMethod,
    model: ModelAdapter,
    preset: str | None = None,
    config: EditConfig | Mapping[str, Any] | None = None,
) -> EditConfig:
    """The settings of an editor.

    preset: name of the preset to start from; default: the one made for a model of this shape
    config: whole settings, taken as they are, or a mapping of changes to the preset, such as {"rounds": 2}; of a method
        without presets, a mapping of all settings that have no default
    Raises ValueError when no preset fits or a value does not; TypeError for the settings of another method."""
    if isinstance(config, EditConfig):
        if preset is not None:
            raise ValueError(f"pass preset= or whole settings as config=, got both (preset {preset!r})")
        if not isinstance(config, method.config_class):
            raise TypeError(f"{method.name} needs a {method.config_class.__name__}, got {type(config).__name__}")
        return config

    if config is not None and method.presets is None:
        whole: EditConfig = method.config_class.model_validate(dict(config))
        return whole

    changes = {} if config is None else config
    if preset is not None:
        return load_preset(method, preset, **changes)
    return changed(preset_for(method, model.n_layers, model.d_model, model.d_ff), changes)


def _read(method: AnyMethod, name: str) -> dict[str, Any]:
    assert method.presets is not None
    path: Path = method.presets / f"{name}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))
