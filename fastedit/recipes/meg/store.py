"""Everything a set of edits is served with, in one safetensors file.

The file holds the neurons and their shared start, the vectors of the prompts, what the encoder learned, the gate and
the generator, and in its header, as JSON, the settings, the edits and the model's fingerprint. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastedit.recipes.meg.config import MegConfig
from fastedit.recipes.meg.neuron import NeuronForm

FORMAT, VERSION = "fastedit-meg", 1

GROUPS = ("encoder", "gate", "generator")


class BadStore(ValueError):
    """The file is no store of this version, or belongs to another model."""


@dataclass
class Store:
    """A fitted set of n edits.

    layer, form: where the neurons stand and what they hold; initial: (size,) their shared start
    facts: (case_id, prompt, target) per edit
    neurons: (n, size) float32; solved: (n,) bool, the fit succeeded; vectors: (n, width) unit vectors of the prompts
    threshold: below it a prompt is edited: of the entropy, or of the cosine distance
    encoder, gate, generator: tensors of the three networks by name, empty where there is none
    fingerprint: of the model's weights; seconds: spent in each stage
    """

    config: MegConfig
    layer: int
    form: NeuronForm
    initial: Tensor
    facts: list[tuple[int | str | None, str, str]]
    neurons: Tensor
    solved: Tensor
    vectors: Tensor
    threshold: float
    fingerprint: str
    seed: int
    encoder: dict[str, Tensor] = field(default_factory=dict)
    gate: dict[str, Tensor] = field(default_factory=dict)
    generator: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.facts)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {name: getattr(self, name) for name in ("initial", "neurons", "solved", "vectors")}
        for group in GROUPS:
            tensors |= {f"{group}.{name}": value for name, value in getattr(self, group).items()}
        about = {
            "config": self.config.model_dump(),
            "layer": self.layer,
            "activation": self.form.activation,
            "bias": self.form.bias,
            "facts": self.facts,
            "threshold": self.threshold,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "seconds": self.seconds,
        }
        write_tensors(path, tensors, FORMAT, about)

    @classmethod
    def load(cls, path: str | Path) -> Store:
        """Read a file that `save` wrote. Raises BadStore for any other."""
        tensors, about = read_tensors(path, FORMAT)
        try:
            groups = {
                group: {name[len(group) + 1 :]: v for name, v in tensors.items() if name.startswith(f"{group}.")}
                for group in GROUPS
            }
            return cls(
                config=MegConfig.model_validate(about["config"]),
                layer=about["layer"],
                form=NeuronForm((tensors["neurons"].shape[1] - about["bias"]) // 2, about["activation"], about["bias"]),
                facts=[(case_id, prompt, target) for case_id, prompt, target in about["facts"]],
                **{name: about[name] for name in ("threshold", "fingerprint", "seed", "seconds")},
                **{name: tensors[name] for name in ("initial", "neurons", "solved", "vectors")},
                **groups,
            )
        except (KeyError, pydantic.ValidationError) as error:
            raise BadStore(f"{path}: a store of version {VERSION} lacks or misnames {error}") from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], form: str, about: Mapping[str, Any]) -> None:
    """Write tensors and plain data into one safetensors file, in place of an older one only when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    header = {"format": form, "version": str(VERSION), "about": json.dumps(about)}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, header)
    part.replace(path)


def read_tensors(path: str | Path, form: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. Raises BadStore for another format or version, OSError for no file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise BadStore(f"{path}: cannot be read as safetensors ({error})") from error
    if header.get("format") != form:
        raise BadStore(f"{path}: wanted format {form!r}, got {header.get('format')!r}")
    if header.get("version") != str(VERSION):
        raise BadStore(f"{path}: wanted version {VERSION}, got {header.get('version')}")
    return tensors, json.loads(header["about"])
