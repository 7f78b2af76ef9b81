"""The presets that ship as data, beside their methods.

A preset is a YAML file `<package>/presets/<method>/<name>.yaml`: `origin` says where its numbers come from, `model` is
the shape it was made for, `config` the fields of the method's config; an unknown field is an error naming it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fastedit.config import EditConfig, changed
from fastedit.methods.closed_form.config import AlphaEditConfig, MEMITConfig, NSEConfig
from fastedit.methods.columns.config import FiNEConfig, KNConfig, KNEConfig

# Presets lie beside the package of their method.
PACKAGES = Path(__file__).parent

CONFIGS: dict[str, type[EditConfig]] = {
    "nse": NSEConfig,
    "memit": MEMITConfig,
    "alphaedit": AlphaEditConfig,
    "fine": FiNEConfig,
    "kne": KNEConfig,
    "kn": KNConfig,
}


def presets(method: str) -> list[str]:
    """Names of the presets that ship for `method`. Raises ValueError for an unknown method."""
    if method not in CONFIGS:
        raise ValueError(f"method must be one of {', '.join(sorted(CONFIGS))}, got {method!r}")
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder(method).iterdir())


def load_preset(method: str, name: str, **changes: Any) -> EditConfig:
    """The preset `name` of `method` with `changes` applied, see `changed`.

    Raises ValueError for an unknown method or preset (listing those that exist) or a value that does not fit."""
    if name not in presets(method):
        raise ValueError(f"{method}: no preset {name!r}; there are {', '.join(presets(method))}")
    return changed(CONFIGS[method].model_validate(_read(method, name)["config"]), changes)


def preset_for(method: str, n_layers: int, d_model: int, d_ff: int) -> EditConfig:
    """The preset of `method` made for a model of this shape. Raises ValueError, listing the presets, when none is."""
    shape = {"n_layers": n_layers, "d_model": d_model, "d_ff": d_ff}
    for name in presets(method):
        if _read(method, name)["model"] == shape:
            return load_preset(method, name)
    raise ValueError(
        f"{method}: no preset was made for a model of {shape}; pass config= or preset= one of"
        f" {', '.join(presets(method))}"
    )


def _read(method: str, name: str) -> dict[str, Any]:
    return yaml.safe_load((_folder(method) / f"{name}.yaml").read_text(encoding="utf-8"))


def _folder(method: str) -> Path:
    return PACKAGES / ("columns" if method in ("fine", "kne", "kn") else "closed_form") / "presets" / method
