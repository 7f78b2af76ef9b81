"""Presets, which ship as data beside their methods, and the settings that an editor starts from.

A preset is a YAML file `<package>/presets/<method>/<name>.yaml`: `origin` says where its numbers come from, `model` is
the shape it was made for, `config` the fields of the method's config; an unknown field is an error naming it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fastedit.config import EditConfig, changed
from fastedit.methods.base import AnyMethod
from fastedit.methods.registry import method_named
from fastedit.model.adapter import ModelAdapter

log = logging.getLogger(__name__)


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
    config: whole settings, taken as they are, or a mapping of changes to the preset, such as {"rounds": 2}; where no
        preset fits, the mapping must hold all settings without a default
    Raises ValueError when no preset fits or a value does not; TypeError for the settings of another method."""
    if isinstance(config, EditConfig):
        if preset is not None:
            raise ValueError(f"pass preset= or whole settings as config=, got both (preset {preset!r})")
        if not isinstance(config, method.config_class):
            raise TypeError(f"{method.name} needs a {method.config_class.__name__}, got {type(config).__name__}")
        return config

    changes = {} if config is None else config
    if preset is not None:
        settings = load_preset(method, preset, **changes)
        _warn_of_another_shape(method, preset, model)
        return settings

    try:
        base = preset_for(method, model.n_layers, model.d_model, model.d_ff)
    except ValueError as error:
        if config is None:
            raise
        return _whole(method, changes, str(error))
    return changed(base, changes)


def _whole(method: AnyMethod, fields: Mapping[str, Any], why: str) -> EditConfig:
    """Settings from these fields and the defaults of the others. why: there is no preset to start from"""
    try:
        settings: EditConfig = method.config_class.model_validate(dict(fields))
    except ValidationError as error:
        problems = error.errors()
        if any(problem["type"] != "missing" for problem in problems):
            raise
        missing = [".".join(map(str, problem["loc"])) for problem in problems]
        raise ValueError(f"{why}; or whole settings: {', '.join(missing)} are missing") from None
    return settings


def _warn_of_another_shape(method: AnyMethod, preset: str, model: ModelAdapter) -> None:
    """A preset's bounds are in units of its own model."""
    made_for = _read(method, preset)["model"]
    shape = {"n_layers": model.n_layers, "d_model": model.d_model, "d_ff": model.d_ff}
    if made_for != shape:
        log.warning("preset %s was made for a model of %s, this one has %s", preset, made_for, shape)


def _read(method: AnyMethod, name: str) -> dict[str, Any]:
    assert method.presets is not None
    path: Path = method.presets / f"{name}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))
