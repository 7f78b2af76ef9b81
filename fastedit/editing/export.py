"""Edits in forms that other programs read: a checkpoint, a delta for plain torch, a LoRA adapter for PEFT.

The delta of a weight is W - W_0, from the float32 master of a half-precision weight. Its rank is the number of edits
written, plus rounding noise. It is stored as two factors: all directions above the noise, or a given number.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastedit.editing import load_delta
from fastedit.editing.checkpoint import main_dtype, rounded_weights, write_checkpoint
from fastedit.editing.gguf_file import base_model, write_gguf
from fastedit.evaluation.answers import answer
from fastedit.model.adapter import ModelAdapter
from fastedit.model.load import ALIASES
from fastedit.model.save import ADAPTERS
from fastedit.records.edit import Edit
from fastedit.records.join import joined
from fastedit.runtime.hashing import canonical
from fastedit.runtime.places import check_folder, check_room, equal_bits, new_folder, save_tensors
from fastedit.weights.editable import EditableWeights
from fastedit.weights.stand_in import standing_in

log = logging.getLogger(__name__)

Format = Literal["checkpoint", "delta", "lora", "gguf"]
FORMATS: tuple[str, ...] = get_args(Format)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NO_CHANGE = "nothing to export: no weight differs from the unedited model"
# Files that an earlier result of the form may have left, and that would be read with the new ones.
STALE = {
    "checkpoint": (
        *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
        *("pytorch_model*.bin", "pytorch_model.bin.index.json", "tokenizer.*", "tokenizer_config.json", "vocab.*"),
        *("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "spiece.model"),
    ),
    "delta": ("delta.safetensors", "load_delta.py"),
    "lora": ("adapter_config.json", "adapter_model.safetensors"),
    "gguf": (),
}
ADAPTERS_BESIDE = (
    f"the weights are those of the edited base model; its LoRA adapters are in {ADAPTERS}/ beside them, unchanged, and"
    " peft puts them on (PeftModel.from_pretrained(base, folder))"
)
# Edits whose texts the saved tokenizer must read as the model's does.
TEXTS_COMPARED = 100


class Holds(NamedTuple):
    """How many of so many edits have every target token ranked first: in the editor's model, and in what was saved."""

    n_edits: int
    in_model: int
    as_saved: int

    def __str__(self) -> str:
        return f"edits that hold: {self.in_model} of {self.n_edits} in the model, {self.as_saved} as saved"


@dataclass(frozen=True)
class Exported:
    """What was written.

    dtype: of a checkpoint's numbers, or of the edited tensors in a GGUF file
    rank: layer -> rank of the factors
    error: layer -> ||exported - delta|| / ||delta||
    holds: None where nothing was edited, and for a checkpoint or GGUF file of the very bits in the model
    notes: what there is to know about it, in sentences
    """

    folder: str
    format: str
    dtype: str | None = None
    rank: dict[int, int] = field(default_factory=dict)
    error: dict[int, float] = field(default_factory=dict)
    holds: Holds | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "holds": None if self.holds is None else self.holds._asdict()}

    def __str__(self) -> str:
        what = "" if self.format == "checkpoint" else f"as {self.format} "
        dtype = "" if self.dtype is None else f"in {self.dtype}, "
        lines = [f"saved {what}to {self.folder}, {dtype}read back and compared"]

        if self.rank:
            worst = max(self.error.values())
            lines.append(f"rank {max(self.rank.values())}, relative error of the deltas at most {worst:.2e}")
        if self.holds is not None:
            lines.append(str(self.holds))
        return "\n".join([*lines, *self.notes])


def export(
    adapter: ModelAdapter,
    weights: EditableWeights,
    edits: Sequence[Edit],
    folder: str | Path,
    form: Format = "checkpoint",
    rank: int | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> Exported:
    """Write the edits of a model to `folder`, read what was written back and compare it.

    form: "checkpoint", an ordinary one; "delta", delta.safetensors and load_delta.py, which needs torch alone; "lora",
        a PEFT adapter; "gguf", the GGUF file that the model came from with the edited tensors replaced
    rank: at most so many directions per weight, for delta and lora; None = all above rounding noise
    dtype: of a checkpoint's weights, None = those of the source; of the edited tensors of a GGUF file, None = float32
    force: replace the files of an earlier result in the folder; all other files there stay
    Raises ValueError for another form, a rank below 1 or without use, a dtype without use or too small, and for no
    change; PlaceError for a folder that is not free, or holds the source; NotSaved if it could not be written."""
    check_export(adapter, folder, form, rank, dtype, force)

    with new_folder(folder, force, stale=STALE[form]) as place:
        if form == "checkpoint":
            exported, saved = _save_checkpoint(adapter, weights, edits, place, None if dtype is None else DTYPES[dtype])
        elif form == "gguf":
            exported, saved = _save_gguf(adapter, weights, place, DTYPES[dtype or "float32"])
        else:
            exported, saved = _save_factors(adapter, weights, place, form, rank)

    # Measured when the files are where they belong, so that they outlive whatever happens meanwhile.
    # A checkpoint of the very bits holds what the model holds.
    is_cut = form in ("delta", "lora")
    return replace(exported, folder=str(folder), holds=_holds(adapter, edits, saved, always=is_cut))


def check_export(
    adapter: ModelAdapter,
    folder: str | Path,
    form: str = "checkpoint",
    rank: int | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> None:
    """What `export` can tell before anything is edited: it raises the same errors, and PlaceError for a full disk."""
    check_options(form, rank, dtype)
    if form == "gguf":
        gguf_source(adapter)

    check_folder(folder, force, [] if adapter.stored is None else [adapter.stored.place])
    check_room(folder, _size(adapter, form, dtype))


def _size(adapter: ModelAdapter, form: str, dtype: str | None) -> int:
    """About how many bytes a result takes; those of an adapter or delta are few, and not known before the edits."""
    if form == "gguf":
        return gguf_source(adapter).stat().st_size
    if form != "checkpoint":
        return 0

    stored = adapter.dtype if adapter.stored is None else adapter.stored.dtype
    width = (stored if dtype is None else DTYPES[dtype]).itemsize
    return width * sum(parameter.numel() for parameter in adapter.model.parameters())


def check_options(form: str, rank: int | None = None, dtype: str | None = None) -> None:
    """Raise ValueError for a form that is unknown, and for a rank or dtype that it does not take."""
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {form!r}")
    given: object = rank
    if given is not None and (type(given) is not int or given < 1 or form not in ("delta", "lora")):
        raise ValueError(f"rank must be a whole number of at least 1 and is for delta and lora, got {rank} for {form}")
    if dtype is None:
        return

    if form not in ("checkpoint", "gguf"):
        raise ValueError(f"dtype is of a checkpoint's weights, got {dtype!r} for {form}, whose numbers are float32")
    if dtype not in DTYPES or (form == "gguf" and dtype == "bfloat16"):
        names = ", ".join(name for name in DTYPES if form != "gguf" or name != "bfloat16")
        raise ValueError(f"dtype of a {form} must be one of {names}, got {dtype!r}")


def gguf_source(adapter: ModelAdapter) -> Path:
    """The GGUF file that a model was loaded from. Raises ValueError for a model that came otherwise."""
    place = None if adapter.stored is None else adapter.stored.place
    if place is None or not place.endswith(".gguf"):
        came = "from memory" if place is None else f"from {adapter.source or place}"
        raise ValueError(
            f"gguf: writes the edits into a copy of the GGUF file that the model came from, and this one came {came};"
            f" the other forms are {', '.join(form for form in FORMATS if form != 'gguf')}"
        )
    return Path(place)


def _save_checkpoint(
    adapter: ModelAdapter, weights: EditableWeights, edits: Sequence[Edit], place: Path, dtype: torch.dtype | None
) -> tuple[Exported, Mapping[str, Tensor]]:
    """What was written, and the tensors in it."""
    tensors = rounded_weights(adapter, weights, dtype)
    texts = [text for edit in edits[:TEXTS_COMPARED] for text in _texts(edit)]
    wrong = write_checkpoint(adapter, tensors, place, texts)
    if wrong is not None:
        log.warning("%s", wrong)

    unedited = None if edits else "no edit is in force: this is the unedited model"
    beside = None if not adapter.has_adapters else ADAPTERS_BESIDE
    notes = tuple(note for note in (wrong, unedited, beside) if note is not None)
    return Exported("", "checkpoint", _name(main_dtype(tensors)), notes=notes), tensors


def _save_gguf(
    adapter: ModelAdapter, weights: EditableWeights, place: Path, dtype: torch.dtype
) -> tuple[Exported, Mapping[str, Tensor]]:
    """As `_save_checkpoint`, with the replaced tensors."""
    source = gguf_source(adapter)
    changed = [layer for layer in weights.layers if bool(delta(weights, layer).any())]
    if not changed:
        raise ValueError(NO_CHANGE)

    saved = {layer: weights.stored(layer).to(dtype) for layer in changed}
    write_gguf(source, place / f"{source.stem}-edited.gguf", saved)

    stored = {adapter.weight_name(layer): adapter.oriented(layer, weight) for layer, weight in saved.items()}
    return Exported("", "gguf", _name(dtype)), stored


def _save_factors(
    adapter: ModelAdapter,
    weights: EditableWeights,
    place: Path,
    form: Literal["delta", "lora"],
    rank: int | None,
) -> tuple[Exported, Mapping[str, Tensor]]:
    """As `_save_checkpoint`, with the weights to which the factors lead."""
    factors = {layer: pair for layer in weights.layers if (pair := _factors(weights, layer, rank)) is not None}
    if not factors:
        raise ValueError(NO_CHANGE)

    notes = []
    if form == "delta":
        _save_delta(adapter, weights, place, factors)
    else:
        notes += _save_lora(adapter, place, factors)

    error = {layer: _error(weights, layer, *pair) for layer, pair in factors.items()}
    ranks = {layer: len(right) for layer, (_, right) in factors.items()}
    if rank is not None and max(ranks.values()) < rank:
        notes.append(f"rank {rank} was asked for: the edits have {max(ranks.values())} directions above rounding noise")

    saved = {}
    for layer, (left, right) in factors.items():
        change = (left @ right).to(adapter.layer_device(layer))
        saved[adapter.weight_name(layer)] = adapter.oriented(layer, weights.original(layer).float() + change)
    return Exported("", form, None, ranks, error, notes=tuple(notes)), saved


def _texts(edit: Edit) -> tuple[str, str]:
    """The prompt of an edit, and the prompt with its target."""
    return edit.prompt, joined(edit.prompt, edit.target_new, edit.join).text


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def delta(weights: EditableWeights, layer: int) -> Tensor:
    """W - W_0, (d_model, d_ff) float64 on the CPU; of a half-precision weight from its float32 master."""
    return (weights.stored(layer).double() - weights.original(layer).double()).cpu()


def _factors(weights: EditableWeights, layer: int, rank: int | None) -> tuple[Tensor, Tensor] | None:
    """(d_model, r) and (r, d_ff) float32 with the delta as their product, None for a weight that is unchanged."""
    change = delta(weights, layer)
    if not bool(change.any()):
        return None

    columns = change.any(0).nonzero().flatten()
    left, sizes, right = torch.linalg.svd(change[:, columns], full_matrices=False)

    # The weight is rounded to float32, which moves each number by up to eps / 2 of itself.
    weight = weights.original(layer).double()
    typical = float(weight.square().mean().sqrt()) * torch.finfo(torch.float32).eps
    noise = typical * sum(size**0.5 for size in weight.shape)
    kept = max(1, int((sizes > noise).sum()))
    kept = kept if rank is None else min(kept, rank)

    roots = sizes[:kept].sqrt()
    wide = torch.zeros(kept, change.shape[1])
    wide[:, columns] = (roots[:, None] * right[:kept]).float()
    return (left[:, :kept] * roots).float().contiguous(), wide


def _save_delta(
    adapter: ModelAdapter, weights: EditableWeights, folder: Path, factors: dict[int, tuple[Tensor, Tensor]]
) -> None:
    tensors = {}
    base_sha256 = {}
    for layer, (left, right) in factors.items():
        name, transposed = adapter.weight_name(layer), _is_transposed(adapter, layer)
        if left.numel() + right.numel() >= left.shape[0] * right.shape[1]:
            full = left @ right
            tensors[f"{name}/delta"] = (full.T if transposed else full).contiguous()
        else:
            tensors[f"{name}/left"] = (right.T if transposed else left).contiguous()
            tensors[f"{name}/right"] = (left.T if transposed else right).contiguous()
        base = adapter.oriented(layer, weights.original(layer))
        base_sha256[name] = {
            str(dtype): load_delta.checksum({name: base.to(dtype)})
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        }

    about = {"format": "pt", "base_sha256": canonical(base_sha256)}
    about["sha256"] = load_delta.checksum(tensors, about)
    save_tensors(tensors, folder / "delta.safetensors", about)
    shutil.copy(load_delta.__file__, folder / "load_delta.py")


def _save_lora(adapter: ModelAdapter, folder: Path, factors: dict[int, tuple[Tensor, Tensor]]) -> list[str]:
    """PEFT adds (alpha / r) B A; with alpha = r that is the product. All weights get the largest rank, rest zeros.

    Returns what there is to know about it, in sentences."""
    base, notes = _base_model(adapter)
    rank = max(len(right) for _, right in factors.values())
    tensors, names = {}, []
    for layer, (left, right) in factors.items():
        name = adapter.weight_name(layer).removesuffix(".weight")
        names.append(name)
        pad = rank - len(right)
        place = f"base_model.model.{name}"
        tensors[f"{place}.lora_A.weight"] = torch.nn.functional.pad(right, (0, 0, 0, pad)).contiguous()
        tensors[f"{place}.lora_B.weight"] = torch.nn.functional.pad(left, (0, pad)).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": names,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": _is_transposed(adapter, next(iter(factors))),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_tensors(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return notes


def _base_model(adapter: ModelAdapter) -> tuple[str | None, list[str]]:
    """The hub id or path under which PEFT finds the unedited model, and what there is to know about it."""
    place = None if adapter.stored is None else adapter.stored.place
    if place is None:
        name = getattr(adapter.model.config, "_name_or_path", "") or None
        missing = "the model came from memory: set base_model_name_or_path in adapter_config.json to where it lies"
        return name, [] if name else [missing]

    if not place.endswith(".gguf"):
        return adapter.source if Path(place).exists() else place, []

    alias = ALIASES.get(adapter.source or "")
    base = (None if alias is None else alias.hub_id) or base_model(Path(place))
    if base is None:
        return place, [
            "PEFT reads no GGUF file: set base_model_name_or_path in adapter_config.json to the model behind it"
        ]
    return base, [f"its base is {base}, whose weights are not those of the quantised file that was edited"]


def _is_transposed(adapter: ModelAdapter, layer: int) -> bool:
    """Whether the model stores the weight as (d_ff, d_model)."""
    return adapter.oriented(layer, torch.empty(2, 1)).shape[0] == 1


def _error(weights: EditableWeights, layer: int, left: Tensor, right: Tensor) -> float:
    change = delta(weights, layer)
    return float((left.double() @ right.double() - change).norm() / change.norm())


def _holds(adapter: ModelAdapter, edits: Sequence[Edit], saved: Mapping[str, Tensor], always: bool) -> Holds | None:
    """How many edits hold with saved tensors in place of the model's, computed in the model's dtype.

    saved: by the names of the state dict, in any dtype
    None without edits, and unless `always` where the model has them already, bit for bit."""
    parameters = adapter.parameters()
    other = {
        name: tensor.to(parameters[name].device, parameters[name].dtype)
        for name, tensor in saved.items()
        if name in parameters
    }
    other = {name: tensor for name, tensor in other.items() if not equal_bits(tensor, parameters[name].data)}
    if not edits or not (other or always):
        return None

    in_model = _n_exact(adapter, edits)
    if not other:
        return Holds(len(edits), in_model, in_model)
    with standing_in(adapter, other):
        return Holds(len(edits), in_model, _n_exact(adapter, edits))


def _n_exact(adapter: ModelAdapter, edits: Sequence[Edit]) -> int:
    pairs = [(edit.prompt, edit.target_new, edit.join) for edit in edits]
    return sum(scored.exact for scored in answer(adapter, pairs))
