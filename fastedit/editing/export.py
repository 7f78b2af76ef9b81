"""Edits in forms that other programs read: a checkpoint, a delta for plain torch, a LoRA adapter for PEFT.

The delta of a weight is W - W_0, from the float32 master of a half-precision weight. Its rank is the number of edits
written, plus rounding noise. It is stored as two factors: all directions above the noise, or a given number.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastedit.editing import load_delta
from fastedit.evaluation.answers import answer
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit
from fastedit.runtime.hashing import canonical
from fastedit.weights.editable import EditableWeights

Format = Literal["checkpoint", "delta", "lora", "gguf"]
FORMATS: tuple[str, ...] = get_args(Format)
CONVERTER = "python convert_hf_to_gguf.py {folder} --outfile edited.gguf --outtype f16"


@dataclass(frozen=True)
class Exported:
    """What was written.

    rank: layer -> rank of the factors
    error: layer -> ||exported - delta|| / ||delta||
    holds: share of the edits with every target token ranked first, in the editor's model and with the exported deltas
    next: what remains to be done by hand, or None
    """

    folder: str
    format: str
    rank: dict[int, int]
    error: dict[int, float]
    holds: tuple[float, float] | None = None
    next: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.format} written to {self.folder}"]
        if self.rank:
            worst = max(self.error.values())
            lines.append(f"rank {max(self.rank.values())}, relative error of the deltas at most {worst:.2e}")
        if self.holds is not None:
            lines.append(f"edits that hold: {self.holds[0]:.1%} in the model, {self.holds[1]:.1%} as exported")
        return "\n".join([*lines, *filter(None, [self.next])])


def export(
    adapter: ModelAdapter,
    weights: EditableWeights,
    edits: Sequence[Edit],
    folder: str | Path,
    form: Format = "checkpoint",
    rank: int | None = None,
    dtype: str | None = None,
) -> Exported:
    """Write the edits of a model to `folder`.

    form: "checkpoint", an ordinary one; "delta", delta.safetensors and load_delta.py, which needs torch alone; "lora",
        a PEFT adapter; "gguf", a checkpoint, and the command that converts it
    rank: at most so many directions per weight, for delta and lora; None = all above rounding noise
    dtype: of a checkpoint's weights; None = the model's
    Raises ValueError for another form, a rank below 1 or without use, a folder that is not empty, or no change."""
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {form!r}")
    if rank is not None and (rank < 1 or form not in ("delta", "lora")):
        raise ValueError(f"rank must be at least 1 and is for delta and lora, got {rank} for {form}")
    if dtype is not None and form not in ("checkpoint", "gguf"):
        raise ValueError(f"dtype is of a checkpoint's weights, got {dtype!r} for {form}")
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{place}: must be absent or an empty folder")

    if form in ("checkpoint", "gguf"):
        save_checkpoint(adapter, place, dtype)
        converts = f"convert it with llama.cpp's: {CONVERTER.format(folder=place)}" if form == "gguf" else None
        return Exported(str(place), form, {}, {}, next=converts)

    factors = {layer: pair for layer in weights.layers if (pair := _factors(weights, layer, rank)) is not None}
    if not factors:
        raise ValueError("nothing to export: no weight differs from the unedited model")

    place.mkdir(parents=True, exist_ok=True)
    if form == "delta":
        _save_delta(adapter, weights, place, factors)
    else:
        _save_lora(adapter, place, factors)

    error = {layer: _error(weights, layer, *pair) for layer, pair in factors.items()}
    ranks = {layer: len(right) for layer, (_, right) in factors.items()}
    return Exported(str(place), form, ranks, error, _holds(adapter, weights, edits, factors))


def save_checkpoint(adapter: ModelAdapter, folder: Path, dtype: str | None = None, max_shard_size: str = "5GB") -> None:
    """Write the edited model and its tokenizer as transformers reads them. dtype: None = as in memory.

    Raises ValueError for another dtype than float32, bfloat16 and float16."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")

    model = adapter.model
    if dtype is not None and getattr(torch, dtype) != adapter.dtype:
        model = copy.deepcopy(model).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    adapter.tokenizer.save_pretrained(folder)


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
    save_file(tensors, folder / "delta.safetensors", about)
    shutil.copy(load_delta.__file__, folder / "load_delta.py")


def _save_lora(adapter: ModelAdapter, folder: Path, factors: dict[int, tuple[Tensor, Tensor]]) -> None:
    """PEFT adds (alpha / r) B A; with alpha = r that is the product. All weights get the largest rank, rest zeros."""
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
        "base_model_name_or_path": adapter.source,
        "target_modules": names,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": _is_transposed(adapter, next(iter(factors))),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _is_transposed(adapter: ModelAdapter, layer: int) -> bool:
    """Whether the model stores the weight as (d_ff, d_model)."""
    return adapter.oriented(layer, torch.empty(2, 1)).shape[0] == 1


def _error(weights: EditableWeights, layer: int, left: Tensor, right: Tensor) -> float:
    change = delta(weights, layer)
    return float((left.double() @ right.double() - change).norm() / change.norm())


def _holds(
    adapter: ModelAdapter,
    weights: EditableWeights,
    edits: Sequence[Edit],
    factors: dict[int, tuple[Tensor, Tensor]],
) -> tuple[float, float] | None:
    """Share of the edits that hold, as the model is and with the factors in place of its deltas."""
    pairs = [(edit.prompt, edit.target_new, edit.join) for edit in edits]
    if not pairs:
        return None

    before = _exact(adapter, pairs)
    changed = {layer: weights.changed(layer) for layer in factors}
    present = {layer: weights.stored(layer, index) for layer, index in changed.items()}
    try:
        for layer, (left, right) in factors.items():
            original = weights.original(layer)
            exported = original.float() + (left @ right).to(original.device)
            index = changed[layer]
            weights.put(layer, index, exported if index is None else exported[:, index])
        after = _exact(adapter, pairs)
    finally:
        for layer, values in present.items():
            weights.put(layer, changed[layer], values)
    return before, after


def _exact(adapter: ModelAdapter, pairs: list[tuple[str, str, str | None]]) -> float:
    return sum(scored.exact for scored in answer(adapter, pairs)) / len(pairs)
