"""Presets, which ship as data beside their methods, and the settings that an editor starts from.

A preset is a YAML file `<package>/presets/<method>/<name>.yaml`: `origin` says where its numbers come from, `model` is
the model it was made for, `config` the fields of the method's config. A preset of your own is such a file at any place,
named by its path; it needs `config` only.

The numbers of a preset are in units of its model, so it serves models that agree in all that `model` says: two models
of one shape may be of different families, as Llama 3 8B and Mistral 7B are. For all other models the settings are
derived (`Method.derive`).
"""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from fastedit.config import EditConfig, WrongSettings, changed, check_changes, settings_from
from fastedit.methods.base import AnyMethod, CannotDerive
from fastedit.methods.registry import METHODS, method_named
from fastedit.model.adapter import ModelAdapter
from fastedit.records.files import read_text
from fastedit.runtime.plain_yaml import NotPlain, plain_yaml
from fastedit.runtime.words import shown

log = logging.getLogger(__name__)

# Settings as they are given to an editor: whole, or changes to a preset.
AnySettings: TypeAlias = EditConfig | Mapping[str, Any] | None

PARTS = ("origin", "model", "config")
SHAPE = ("n_layers", "d_model", "d_ff")
# What a preset may say of its model beside the shape, by the names of transformers' configs.
CONFIG_NAMES = {
    "model_type": "model_type",
    "vocab_size": "vocab_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "rope_theta": "rope_theta",
}

# A model as a preset describes it.
Described: TypeAlias = Mapping[str, int | float | str | None]


class NoPreset(ValueError):
    """No preset was made for this model. reason: that alone; advice: what to do"""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason = reason
        self.advice = advice


class Settled(NamedTuple):
    """The settings of an editor.

    origin: "given" whole by the caller, "derived" from the model, or the name or file of a preset
    changes: what the caller changed in a preset or in derived settings
    """

    config: EditConfig
    origin: str
    changes: Mapping[str, Any]


class Preset(NamedTuple):
    """What a preset file holds.

    path: of the file; model: what it was made for, None where the file does not say; config: the settings
    """

    path: Path
    model: Described | None
    config: dict[str, Any]

    def differences(self, model: Described) -> list[str]:
        """What the preset says of its model and this one is not, in words."""
        made_for = self.model or {}
        return [f"{name} {made_for[name]}, not {model[name]}" for name in made_for if made_for[name] != model[name]]

    def is_of_shape(self, model: Described) -> bool:
        """Whether the preset was made for a model of this one's shape."""
        return self.model is not None and all(self.model[name] == model[name] for name in SHAPE)


def described(model: ModelAdapter) -> Described:
    """A model as presets describe theirs."""
    config = model.text_config
    rope = getattr(config, "rope_parameters", None) or {}
    values = {name: getattr(config, theirs, None) for name, theirs in CONFIG_NAMES.items()}
    # transformers 5 keeps it among others of its kind; a model with several kinds of layers has several.
    values["rope_theta"] = rope.get("rope_theta", values["rope_theta"])

    return {"n_layers": model.n_layers, "d_model": model.d_model, "d_ff": model.d_ff, **values}


def presets(method: str | AnyMethod) -> list[str]:
    """Names of the presets that ship for a method. Raises ValueError for an unknown method."""
    folder = method_named(method).presets
    return [] if folder is None else sorted(path.stem for path in folder.glob("*.yaml"))


def load_preset(method: str | AnyMethod, name: str | Path, **changes: Any) -> EditConfig:
    """A preset of a method with `changes` applied, see `fastedit.config.changed`.

    name: of a preset that ships, or the path of a .yaml file
    Raises ValueError for an unknown method, an unknown preset (listing those that ship), a file that is no preset, or
    values that do not fit; OSError for a file that cannot be read."""
    method = method_named(method)
    return changed(_settings_of(method, _read(_path_of(method, name))), changes)


def preset_for(method: str | AnyMethod, model: ModelAdapter) -> EditConfig:
    """The preset that was made for a model like this. Raises NoPreset, listing the presets, when none was."""
    method = method_named(method)
    return load_preset(method, _name_for(method, model))


def _name_for(method: AnyMethod, model: ModelAdapter) -> str:
    """The name of the preset that was made for a model like this; raises as `preset_for`."""
    about = described(model)
    alike = []
    for name in presets(method):
        preset = _read(_path_of(method, name))
        differences = preset.differences(about)
        if preset.model is not None and not differences:
            log.info("%s: settings of preset %s", method.name, name)
            return name
        if preset.is_of_shape(about):
            alike.append(f"{name} has its shape, but {', '.join(differences)}")

    advice = "give settings (--set, config=)"
    if presets(method):
        advice = f"name one of {', '.join(presets(method))} (--preset, preset=) or {advice}"
    shape = {name: about[name] for name in SHAPE}
    reason = f"{method.name}: no preset was made for a model of {shape}"
    raise NoPreset(f"{reason} ({'; '.join(alike)})" if alike else reason, advice)


def settings_for(
    method: AnyMethod, model: ModelAdapter, preset: str | Path | None = None, config: AnySettings = None
) -> EditConfig:
    """The settings of an editor, see `settle`."""
    return settle(method, model, preset, config).config


def settle(
    method: AnyMethod, model: ModelAdapter, preset: str | Path | None = None, config: AnySettings = None
) -> Settled:
    """The settings of an editor, and where they come from.

    preset: name or file of the preset to start from; default: the one made for a model like this, else settings derived
        from the model
    config: whole settings, taken as they are, or a mapping of changes to the preset or to the derived settings, such as
        {"rounds": 2}; for a method that derives none, it must hold all settings without a default
    Raises NoPreset when no preset fits and none can be derived, ValueError when a value does not; TypeError for the
    settings of another method."""
    check_settings(method, preset, config)
    if isinstance(config, EditConfig):
        return Settled(config, "given", {})

    changes = {} if config is None else config
    if preset is not None:
        _warn_of_another_model(_read(_path_of(method, preset)), preset, model)
        return Settled(load_preset(method, preset, **changes), str(preset), changes)

    try:
        name = _name_for(method, model)
    except NoPreset as error:
        if method.derive is None and config is None:
            raise
        if method.derive is None:
            return Settled(_whole(method, changes, error), "given", {})

        try:
            return Settled(derived_settings(method, model, changes), "derived", changes)
        except CannotDerive as why:
            raise NoPreset(f"{error.reason}, and none can be derived: {why}", error.advice) from why
    return Settled(load_preset(method, name, **changes), name, changes)


def check_settings(method: AnyMethod, preset: str | Path | None = None, config: AnySettings = None) -> None:
    """Judge all that `settings_for` can judge without the model, and raise what it would raise."""
    if isinstance(config, EditConfig):
        if preset is not None:
            raise ValueError(f"pass preset= or whole settings as config=, got both (preset {str(preset)!r})")
        if not isinstance(config, method.config_class):
            raise TypeError(f"{method.name} needs a {method.config_class.__name__}, got {type(config).__name__}")
        return

    if config is not None and not isinstance(config, Mapping):
        raise TypeError(f"config: wanted settings or a mapping of changes, got {type(config).__name__}")

    changes = {} if config is None else config
    check_changes(method.config_class, changes)
    if preset is not None:
        load_preset(method, preset, **changes)


def derived_settings(method: AnyMethod, model: ModelAdapter, changes: Mapping[str, Any]) -> EditConfig:
    """Settings made for this model, with changes.

    Raises CannotDerive for a model for which, or a method from which, none can be derived; ValueError for a change
    that does not fit."""
    if method.derive is None:
        raise CannotDerive(f"{method.name} derives no settings")

    settings: EditConfig = settings_from(method.config_class, method.derive(model, changes))
    return changed(settings, changes)


def _whole(method: AnyMethod, fields: Mapping[str, Any], why: NoPreset) -> EditConfig:
    """Settings from these fields and the defaults of the others. why: there is no preset to start from"""
    try:
        settings: EditConfig = settings_from(method.config_class, fields)
    except WrongSettings as error:
        if any(problem.kind != "missing" for problem in error.problems):
            raise
        missing = [".".join(problem.path) for problem in error.problems]
        are = "is" if len(missing) == 1 else "are"
        raise NoPreset(why.reason, f"{why.advice}, of which {', '.join(missing)} {are} missing") from None
    return settings


def _warn_of_another_model(preset: Preset, name: str | Path, model: ModelAdapter) -> None:
    """A preset's numbers are in units of its own model."""
    differences = preset.differences(described(model))
    if differences:
        log.warning("preset %s was made for another model: %s", name, ", ".join(differences))


def _path_of(method: AnyMethod, name: str | Path) -> Path:
    """The file of a preset. Raises ValueError for a name that is none of those that ship."""
    if isinstance(name, Path) or name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name:
        return Path(name)

    if name in presets(method):
        assert method.presets is not None
        return method.presets / f"{name}.yaml"

    close = difflib.get_close_matches(name, presets(method), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    if Path(f"{name}.yaml").is_file():
        hint = f"; the file is named with its ending, {name}.yaml"
    names = ", ".join(presets(method)) or "none"
    raise ValueError(f"{method.name}: no preset {shown(name)}; there are {names}{hint}")


def _settings_of(method: AnyMethod, preset: Preset) -> EditConfig:
    """The settings of a preset. Raises ValueError naming the file and each field, and the methods that it may be of."""
    try:
        settings: EditConfig = settings_from(method.config_class, preset.config)
    except WrongSettings as error:
        lines = str(error).splitlines()
        owners = _owners(preset) if any(problem.kind == "unknown" for problem in error.problems) else []
        if owners:
            lines.append(
                f"these are settings of {' or '.join(owners)}, not of {method.name}; name it (--method, method=)"
            )
        raise ValueError("\n".join(f"{preset.path}: {line}" for line in lines)) from None
    return settings


def _owners(preset: Preset) -> list[str]:
    """Names of the shipped methods that take these settings as they are."""
    names = []
    for name, method in METHODS.items():
        with contextlib.suppress(WrongSettings):
            settings_from(method.config_class, preset.config)
            names.append(name)

    return names


def _read(path: Path) -> Preset:
    """What a preset file holds. Raises ValueError naming the file and what is wrong in it, OSError as `read_text`."""
    try:
        data = plain_yaml(read_text(path))
    except NotPlain as error:
        place = "" if error.line is None else f":{error.line}:{error.column}"
        raise ValueError(f"{path}{place}: {error}") from None

    if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
        wanted = "must hold a mapping `config`, and beside it `model` and `origin` or neither"
        found = ", ".join(map(str, data)) if isinstance(data, dict) else shown(data)
        raise ValueError(f"{path}: a preset {wanted}, got {found}")

    unknown = [shown(name) for name in data if name not in PARTS]
    if unknown:
        raise ValueError(f"{path}: a preset has {', '.join(PARTS)}, and no {', '.join(unknown)}")

    return Preset(path, _model(path, data.get("model")), data["config"])


def _model(path: Path, model: Any) -> Described | None:
    """The model that a preset was made for. Raises ValueError for another mapping than `described` makes."""
    if model is None:
        return None

    if not isinstance(model, dict) or not set(SHAPE) <= set(model) <= {*SHAPE, *CONFIG_NAMES}:
        more = ", ".join(CONFIG_NAMES)
        raise ValueError(f"{path}: model must hold {', '.join(SHAPE)}, and may hold {more}, got {shown(model)}")

    for name, value in model.items():
        wanted = "a text" if name == "model_type" else "a number" if name == "rope_theta" else "a whole number"
        kinds = {"a text": (str,), "a number": (int, float), "a whole number": (int,)}[wanted]
        if type(value) not in kinds or (not isinstance(value, str) and value <= 0):
            raise ValueError(f"{path}: model.{name} must be {wanted}, got {shown(value)}")
    return dict(model)
