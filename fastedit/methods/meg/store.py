"""Everything a set of edits is served with, in one safetensors file.

The file holds the neurons and their shared start, the vectors of the prompts, what the encoder learned, the gate and
the generator, and in its header, as JSON, the settings, the edits and the model's fingerprint. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastedit.methods.meg.config import MegConfig
from fastedit.methods.meg.neuron import NeuronForm

FORMAT, STAGE, VERSION = "fastedit-meg", "fastedit-meg-stage", 1

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
                threshold=about["threshold"],
                fingerprint=about["fingerprint"],
                seed=about["seed"],
                seconds=about["seconds"],
                initial=tensors["initial"],
                neurons=tensors["neurons"],
                solved=tensors["solved"],
                vectors=tensors["vectors"],
                encoder=groups["encoder"],
                gate=groups["gate"],
                generator=groups["generator"],
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


class KnownNeurons:
    """Neurons fitted so far, by the digest of what they were fitted to: the one stage that grows edit by edit.

    initial: their shared start, or None before the first; place: digest -> row of flat (n, size) and solved (n,)
    seconds: spent on fitting them"""

    def __init__(self) -> None:
        self.initial: Tensor | None = None
        self.place: dict[str, int] = {}
        self.flat, self.solved = torch.empty(0, 0), torch.empty(0, dtype=torch.bool)
        self.seconds = 0.0

    @classmethod
    def read(cls, folder: Path | None, key: str) -> KnownNeurons:
        """What a folder holds that was fitted under `key`, or nothing."""
        known = cls()
        path = None if folder is None else folder / "neurons.safetensors"
        if path is not None and path.is_file():
            tensors, about = read_tensors(path, STAGE)
            if about["key"] == key:
                known.initial, known.flat, known.solved = (tensors[name] for name in ("initial", "flat", "solved"))
                known.place = {name: i for i, name in enumerate(about["names"])}
                known.seconds = about["seconds"]
        return known

    def add(self, names: Sequence[str], flat: Tensor, solved: Tensor, seconds: float) -> None:
        """Put more neurons behind the others."""
        self.place |= {name: len(self.flat) + i for i, name in enumerate(names)}
        self.flat = torch.cat([self.flat, flat]) if len(self.flat) else flat
        self.solved = torch.cat([self.solved, solved])
        self.seconds += seconds

    def write(self, folder: Path | None, key: str) -> None:
        """Write the folder's file, for `read` under the same key."""
        if folder is None or self.initial is None:
            return
        tensors = {"initial": self.initial, "flat": self.flat, "solved": self.solved}
        names = sorted(self.place, key=lambda name: self.place[name])
        about = {"key": key, "names": names, "seconds": self.seconds}
        write_tensors(folder / "neurons.safetensors", tensors, STAGE, about)
