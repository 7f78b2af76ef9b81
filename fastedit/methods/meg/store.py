"""Everything that serving a set of edits needs, in one safetensors file.

The file holds the neurons and their shared start, the vectors of the prompts, what the encoder learned, the gate, the
generator, and the edits' records, which are JSON bytes in a tensor because the size of a header is limited. The header,
as JSON, holds the settings, prompt and target of every edit, and the fingerprint of the model. No pickle. A checksum
covers header and tensors; files of earlier versions have none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastedit.config import WrongSettings
from fastedit.methods.meg.config import MegConfig
from fastedit.methods.meg.neuron import NeuronForm
from fastedit.records.edit import Edit, InvalidEdits
from fastedit.runtime.hashing import canonical, tensors_hash
from fastedit.runtime.places import new_file, save_tensors

FORMAT, STAGE, VERSION = "fastedit-meg", "fastedit-meg-stage", 1

MAKE_ANEW = "restore it, or delete it and edit again"

GROUPS = ("encoder", "gate", "generator")


class BadStore(ValueError):
    """The file is no store of this version, or belongs to another model."""


@dataclass
class Store:
    """A fitted set of n edits.

    layer, form: the layer of the neurons, and what a flat neuron holds; initial: (size,) float32 their shared start
    facts: (case_id, prompt, target) per edit
    neurons: (n, size) float32; solved: (n,) bool, the fit succeeded; vectors: (n, width) unit vectors of the prompts
    threshold: a prompt is edited when its score, an entropy in nats or a cosine distance, lies below it
    fingerprint: of the model's weights
    encoder, gate, generator: tensors of the three networks by name; empty without such a network
    seconds: time spent in each stage
    records: the edits in full, which adding further edits needs; None in a file of an earlier version
    encoder_key: digest of what the encoder was trained on; "" for one that was not trained
    n_others: number of records that are not edited from which encoder, gate and threshold were learned
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
    records: tuple[Edit, ...] | None = None
    encoder_key: str = ""
    n_others: int = 0

    def __len__(self) -> int:
        return len(self.facts)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the file. force: replace an older one, when the new one is complete

        Raises PlaceError where a file stands, NotSaved if it cannot be written."""
        tensors = {name: getattr(self, name) for name in ("initial", "neurons", "solved", "vectors")}
        for group in GROUPS:
            tensors |= {f"{group}.{name}": value for name, value in getattr(self, group).items()}
        if self.records is not None:
            tensors["records"] = _as_tensor(self.records)

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
            "encoder_key": self.encoder_key,
            "n_others": self.n_others,
        }
        write_tensors(path, tensors, FORMAT, about, force)

    @classmethod
    def load(cls, path: str | Path) -> Store:
        """Read a file that `save` wrote. Raises BadStore for any other file, FileNotFoundError for none."""
        tensors, about = read_tensors(path, FORMAT)
        try:
            groups = {
                group: {name[len(group) + 1 :]: v for name, v in tensors.items() if name.startswith(f"{group}.")}
                for group in GROUPS
            }
            return cls(
                config=MegConfig(**about["config"]),
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
                records=_as_records(tensors["records"]) if "records" in tensors else None,
                encoder_key=about.get("encoder_key", ""),
                n_others=about.get("n_others", 0),
            )
        except (KeyError, WrongSettings, InvalidEdits) as error:
            raise BadStore(f"{path}: a store of version {VERSION} lacks or misnames {error}") from error


def _as_tensor(records: Sequence[Edit]) -> Tensor:
    """Records as JSON bytes, (n_bytes,) uint8."""
    text = json.dumps([record.model_dump(mode="json") for record in records])
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _as_records(stored: Tensor) -> tuple[Edit, ...]:
    """The records behind the bytes of `_as_tensor`."""
    return tuple(Edit(**fields) for fields in json.loads(stored.numpy().tobytes()))


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], form: str, about: Mapping[str, object], force: bool = True
) -> None:
    """Write tensors and plain data into one safetensors file; an older file is replaced only by a complete one.

    force: whether it is replaced at all. Raises PlaceError, NotSaved."""
    header = {"format": form, "version": str(VERSION), "about": json.dumps(about)}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    with new_file(path, force) as part:
        save_tensors(plain, part, {**header, "sha256": _checksum(header, plain)})


def _checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header, which holds no checksum itself, and the tensors."""
    return hashlib.sha256(f"{canonical(header)}\n{tensors_hash(tensors)}".encode()).hexdigest()


def read_tensors(path: str | Path, form: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. Raises BadStore for another format or version and for other bytes than were written,
    FileNotFoundError for no file."""
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

    # Of any other name in the header: a checksum whose name was damaged must not pass for a file without one.
    written = {name: text for name, text in header.items() if name != "sha256"}
    if header.keys() != {"format", "version", "about"} and header.get("sha256") != _checksum(written, tensors):
        raise BadStore(f"{path}: its bytes are not those that were written (checksum differs); {MAKE_ANEW}")
    return tensors, json.loads(header["about"])


class KnownNeurons:
    """The neurons fitted so far, each under the digest of its token sequence.

    initial: (size,) float32, their shared start, None before the first fit
    place: digest -> row of flat (n, size) float32 and solved (n,) bool
    seconds: time spent on fitting them"""

    def __init__(self, initial: Tensor | None = None) -> None:
        self.initial = initial
        self.place: dict[str, int] = {}
        self.flat, self.solved = torch.empty(0, 0), torch.empty(0, dtype=torch.bool)
        self.seconds = 0.0

    @classmethod
    def read(cls, folder: Path | None, key: str) -> KnownNeurons:
        """The neurons of the folder's file if they were fitted under `key`, else none."""
        known = cls()
        path = None if folder is None else folder / "neurons.safetensors"
        if path is None or not path.is_file():
            return known

        tensors, about = read_tensors(path, STAGE)
        if about["key"] == key:
            known.initial, known.flat, known.solved = (tensors[name] for name in ("initial", "flat", "solved"))
            known.place = {name: i for i, name in enumerate(about["names"])}
            known.seconds = about["seconds"]
        return known

    def add(self, names: Sequence[str], flat: Tensor, solved: Tensor, seconds: float) -> None:
        """Append neurons; a name that is known already stands for the new neuron from then on."""
        self.place |= {name: len(self.flat) + i for i, name in enumerate(names)}
        self.flat = torch.cat([self.flat, flat]) if len(self.flat) else flat
        self.solved = torch.cat([self.solved, solved])
        self.seconds += seconds

    def rows(self, names: Sequence[str]) -> Tensor:
        """Rows of these names, (len(names),) int64. Raises KeyError for an unknown name."""
        return torch.tensor([self.place[name] for name in names], dtype=torch.int64)

    def write(self, folder: Path | None, key: str) -> None:
        """Write the folder's file, for `read` under the same key. Does nothing without a folder."""
        if folder is None or self.initial is None:
            return
        names = sorted(self.place, key=lambda name: self.place[name])
        # Two edits of one prompt and answer have one name: only the rows that a name points to are kept.
        rows = self.rows(names)
        tensors = {"initial": self.initial, "flat": self.flat[rows], "solved": self.solved[rows]}
        about = {"key": key, "names": names, "seconds": self.seconds}
        write_tensors(folder / "neurons.safetensors", tensors, STAGE, about)
