"""Second moments C = mean(k k^T) of background keys, for all wanted layers in one pass that stops after the last.

Stored as one safetensors file per layer, the lower triangle packed, with its provenance; found again by a content key
over (weights that produce the keys, layer, source, tokens, window), so nothing is computed twice and nothing foreign
is taken for ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastedit.config import MomentConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.model.packed_attention import CausalPlan
from fastedit.ops.gram_update import gram_update
from fastedit.runtime.cache import cache_folder
from fastedit.runtime.progress import track

FORMAT = "fastedit second moment 1"


class BadMoments(ValueError):
    """A file of second moments that is corrupt or belongs to something else."""


def second_moments(
    model: ModelAdapter,
    layers: Sequence[int],
    source: Source,
    config: MomentConfig,
    folder: Path | None = None,
    show: bool | None = None,
) -> dict[int, Tensor]:
    """layer -> C, (d_ff, d_ff) float32: loaded from `folder` (default: the cache) where stored, else computed and
    stored there. Raises BadMoments for a stored file that does not hold what its name says."""
    folder = folder or cache_folder() / "moments"
    about = {layer: provenance(model, layer, source, config) for layer in layers}
    paths = {layer: folder / f"{content_key(about[layer])}.safetensors" for layer in layers}
    missing = [layer for layer in layers if not paths[layer].exists()]
    if missing:
        windows = source.windows(model, config, show)
        total = sum(len(window) for window in windows)
        with track(total, "second moments", "tokens", show) as advance:
            made = accumulate(model, missing, windows, config.token_budget, advance)
        for layer in missing:
            save_moment(paths[layer], made[layer], {**about[layer], "tokens_used": str(total)})
    return {layer: load_moment(paths[layer], model.d_ff, about[layer]).to(model.device) for layer in layers}


@torch.no_grad()
def accumulate(
    model: ModelAdapter,
    layers: Sequence[int],
    windows: Sequence[Sequence[int]],
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> dict[int, Tensor]:
    """layer -> mean of k k^T over all tokens of all windows, (d_ff, d_ff) float32.

    Windows of one length run together, up to token_budget tokens, so nothing is padded. Products and sums in float32,
    one addition per batch."""
    sums = {layer: torch.zeros(model.d_ff, model.d_ff, device=model.layer_device(layer)) for layer in layers}
    by_length: dict[int, list[Sequence[int]]] = {}
    for window in windows:
        by_length.setdefault(len(window), []).append(window)
    with model.packed():
        for length, group in by_length.items():
            size = max(1, token_budget // length)
            for start in range(0, len(group), size):
                batch = torch.tensor(group[start : start + size], device=model.device)
                _add_batch(model, sums, batch)
                if progress is not None:
                    progress(batch.numel())
    total = sum(len(window) for window in windows)
    return {layer: summed.div_(total) for layer, summed in sums.items()}


def _add_batch(model: ModelAdapter, sums: dict[int, Tensor], batch: Tensor) -> None:
    n_sequences, length = batch.shape
    plan = CausalPlan(length)
    positions = torch.arange(length, device=batch.device).repeat(n_sequences)
    rotary = model.rotary(positions)
    rows = model.embed(batch.flatten(), positions)
    for layer in range(max(sums) + 1):
        mixed = model.mix(layer, rows, plan, rotary)
        if layer in sums:
            rows, keys = model.feed_forward_with_keys(layer, mixed)
            gram_update(sums[layer], keys.float())
        else:
            rows = model.feed_forward(layer, mixed)


def provenance(model: ModelAdapter, layer: int, source: Source, config: MomentConfig) -> dict[str, str]:
    """Everything the second moment of a layer depends on."""
    return {
        "format": FORMAT,
        "weights": model.weights_hash(layer),
        "layer": str(layer),
        "source": source.identity(),
        "tokens": str(config.tokens),
        "window": str(config.window),
    }


def content_key(about: dict[str, str]) -> str:
    """File name of a provenance: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def save_moment(path: Path, moment: Tensor, about: dict[str, str]) -> None:
    """Write the lower triangle of C (d_ff, d_ff), packed row by row, with its provenance; atomic."""
    lower = moment.cpu()[torch.tril_indices(*moment.shape).unbind()].contiguous()
    digest = hashlib.sha256(lower.numpy().tobytes()).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({"second_moment": lower}, partial, {**about, "d_ff": str(moment.shape[0]), "sha256": digest})
    partial.replace(path)


def load_moment(path: Path, d_ff: int, about: dict[str, str] | None = None) -> Tensor:
    """C, (d_ff, d_ff) float32. With `about`, its provenance must be the file's.

    Raises BadMoments naming the file and the reason."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            lower = file.get_tensor("second_moment")
    except (SafetensorError, OSError) as error:
        raise BadMoments(f"{path}: not a readable file of second moments ({error})") from error
    if metadata.get("format") != FORMAT:
        raise BadMoments(f"{path}: format {metadata.get('format')!r}, wanted {FORMAT!r}")
    if metadata.get("d_ff") != str(d_ff) or lower.numel() != d_ff * (d_ff + 1) // 2:
        raise BadMoments(f"{path}: made for d_ff {metadata.get('d_ff')}, the model has {d_ff}")
    if hashlib.sha256(lower.numpy().tobytes()).hexdigest() != metadata.get("sha256"):
        raise BadMoments(f"{path}: its numbers do not match their checksum; delete the file to compute it again")
    for name, wanted in (about or {}).items():
        if metadata.get(name) != wanted:
            raise BadMoments(f"{path}: {name} is {metadata.get(name)!r}, wanted {wanted!r}")
    moment = torch.zeros(d_ff, d_ff)
    rows, columns = torch.tril_indices(d_ff, d_ff).unbind()
    moment[rows, columns] = lower
    moment[columns, rows] = lower
    if not bool(torch.isfinite(moment).all()) or not bool((moment.diagonal() >= 0).all()):
        raise BadMoments(f"{path}: holds NaN, Inf or a negative diagonal")
    return moment
