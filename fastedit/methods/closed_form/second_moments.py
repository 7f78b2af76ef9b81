"""Second moments C = mean of k k^T over background keys, for all wanted layers in one pass that stops after the last.

Each layer has a safetensors file of its own with the lower triangle, packed, and its provenance: the weights that
produce the keys, the layer, the source of the text, the number of tokens and the window. The file is named by a hash
of the provenance. A second moment is therefore computed once, and never taken for that of another model or text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastedit.config import MomentConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.model.packed_attention import CausalPlan
from fastedit.ops.gram_update import gram_update
from fastedit.runtime.cache import cache_folder, store_in_cache
from fastedit.runtime.places import check_room, check_writable
from fastedit.runtime.progress import Show, track
from fastedit.runtime.words import grouped, told_by

log = logging.getLogger(__name__)

FORMAT = "fastedit second moment 1"


class BadMoments(ValueError):
    """A file of second moments is damaged, or it belongs to another model, layer or text."""


def second_moments(
    model: ModelAdapter,
    layers: Sequence[int],
    source: Source,
    config: MomentConfig,
    folder: Path | None = None,
    show: Show = None,
) -> dict[int, Tensor]:
    """Second moments by layer, each C (d_ff, d_ff) float32 on `ModelAdapter.device`.

    Stored ones are loaded; the others are computed in one pass and stored.

    folder: where they are stored; None = in the cache
    show: True or False shows or hides the progress bar, None as the terminal can
    Raises BadMoments for a stored file that does not hold what its name says, ValueError for an empty text, and
    PlaceError, before anything is computed, for a folder that was named and cannot be written."""
    in_cache = folder is None
    folder = folder or cache_folder() / "moments"
    origins = {layer: provenance(model, layer, source, config) for layer in layers}
    paths = {layer: folder / f"{content_key(origin)}.safetensors" for layer, origin in origins.items()}

    computed: dict[int, Tensor] = {}
    # os.path, unlike Path.exists, takes a folder that may not be entered for one that holds nothing.
    missing = [layer for layer in layers if not os.path.isfile(paths[layer])]
    if missing:
        if not in_cache:
            check_writable(folder)
            check_room(folder, len(missing) * 4 * model.d_ff * (model.d_ff + 1) // 2)
        windows = source.windows(model, config, show)
        n_tokens = sum(len(window) for window in windows)
        if n_tokens < model.d_ff:
            _warn_of_few(n_tokens, model.d_ff)

        with track(n_tokens, f"second moments of layers {_range(missing)}", "tokens", show) as advance:
            moments = accumulate(model, missing, windows, config.token_budget, advance)
        for layer in missing:
            origin = {**origins[layer], "tokens_used": str(n_tokens)}
            computed[layer] = save_moment(paths[layer], moments.pop(layer), origin, required=not in_cache)
            _check_numbers(paths[layer], computed[layer])

    for layer in layers:
        if layer not in computed:
            computed[layer] = load_moment(paths[layer], model.d_ff, origins[layer])
    return {layer: computed[layer].to(model.device) for layer in layers}


def _warn_of_few(n_tokens: int, d_ff: int) -> None:
    log.warning(
        "second moments of %s tokens have no full rank, since d_ff is %s: systems may not be solvable; read more",
        grouped(n_tokens),
        grouped(d_ff),
    )


def _range(layers: Sequence[int]) -> str:
    """Ascending layers as 4-8 where none is left out, else as 4, 6, 8."""
    first, last = layers[0], layers[-1]
    if len(layers) > 1 and list(layers) == list(range(first, last + 1)):
        return f"{first}-{last}"
    return ", ".join(map(str, layers))


@torch.no_grad()
def accumulate(
    model: ModelAdapter,
    layers: Sequence[int],
    windows: Sequence[Sequence[int]],
    token_budget: int,
    progress: Callable[[float], None] | None = None,
) -> dict[int, Tensor]:
    """Mean of k k^T over all tokens of all windows, by layer, each (d_ff, d_ff) float32 on the layer's device.

    windows: token ids
    token_budget: tokens run together; only windows of one length are, so nothing is padded
    progress: called with the number of tokens that were run since the last call
    Products and sums are taken in float32, with one addition per batch."""
    sums = {layer: torch.zeros(model.d_ff, model.d_ff, device=model.layer_device(layer)) for layer in layers}
    with model.packed():
        for windows_of_batch in _batches(windows, token_budget):
            batch = torch.tensor(windows_of_batch, device=model.device)
            _add_batch(model, sums, batch)
            if progress is not None:
                progress(batch.numel())

    n_tokens = sum(len(window) for window in windows)
    return {layer: summed.div_(n_tokens) for layer, summed in sums.items()}


def _batches(windows: Sequence[Sequence[int]], token_budget: int) -> Iterator[list[Sequence[int]]]:
    """Batches of windows of one length, each of at most token_budget tokens (or one window)."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for window in windows:
        by_length.setdefault(len(window), []).append(window)

    for length, group in by_length.items():
        size = max(1, token_budget // length)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _add_batch(model: ModelAdapter, sums: dict[int, Tensor], batch: Tensor) -> None:
    """Add k k^T of every token of `batch` (n_sequences, length) int64 to the sums, in place."""
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
    """Everything that the second moment of a layer depends on."""
    return {
        "format": FORMAT,
        "weights": model.weights_hash(layer),
        "layer": str(layer),
        "source": source.identity(),
        "tokens": str(config.tokens),
        "window": str(config.window),
    }


def content_key(origin: dict[str, str]) -> str:
    """The file name of a provenance: 32 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:32]


def save_moment(path: Path, moment: Tensor, origin: dict[str, str], required: bool = True) -> Tensor:
    """Write the lower triangle of C (d_ff, d_ff), packed row by row, with its provenance, in one atomic step.

    required: raise where it cannot be written, instead of a warning
    Returns what `load_moment` reads from the file, bit for bit, (d_ff, d_ff) float32 on the CPU."""
    lower = moment.cpu()[torch.tril_indices(*moment.shape).unbind()].contiguous()
    digest = hashlib.sha256(lower.numpy().tobytes()).hexdigest()

    about = {**origin, "d_ff": str(moment.shape[0]), "sha256": digest}
    store_in_cache(path, {"second_moment": lower}, about, required)
    return _symmetric(lower, moment.shape[0])


def load_moment(path: Path, d_ff: int, origin: dict[str, str] | None = None) -> Tensor:
    """C, (d_ff, d_ff) float32 on the CPU.

    origin: the provenance that the file must have; None = any
    Raises BadMoments naming the file and the reason."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            lower = file.get_tensor("second_moment")
    except (SafetensorError, OSError) as error:
        raise BadMoments(f"{path}: not a readable file of second moments ({told_by(error)})") from error

    _check_file(path, metadata, lower, d_ff, origin or {})
    moment = _symmetric(lower, d_ff)
    _check_numbers(path, moment)
    return moment


def _check_numbers(path: Path, moment: Tensor) -> None:
    """Raises BadMoments for what no second moment can be."""
    if not bool(torch.isfinite(moment).all()) or not bool((moment.diagonal() >= 0).all()):
        raise BadMoments(f"{path}: holds NaN, Inf or a negative diagonal")


def _check_file(path: Path, metadata: dict[str, str], lower: Tensor, d_ff: int, origin: dict[str, str]) -> None:
    """Raises BadMoments where format, size, checksum or provenance of a file are not the wanted ones."""
    if metadata.get("format") != FORMAT:
        raise BadMoments(f"{path}: format {metadata.get('format')!r}, wanted {FORMAT!r}")
    if metadata.get("d_ff") != str(d_ff) or lower.numel() != d_ff * (d_ff + 1) // 2:
        raise BadMoments(f"{path}: made for d_ff {metadata.get('d_ff')}, the model has {d_ff}")
    if hashlib.sha256(lower.numpy().tobytes()).hexdigest() != metadata.get("sha256"):
        raise BadMoments(f"{path}: its numbers do not match their checksum; delete the file to compute it again")

    for name, wanted in origin.items():
        if metadata.get(name) != wanted:
            raise BadMoments(f"{path}: {name} is {metadata.get(name)!r}, wanted {wanted!r}")


def _symmetric(lower: Tensor, d_ff: int) -> Tensor:
    """The symmetric matrix (d_ff, d_ff) of a packed lower triangle (d_ff * (d_ff + 1) / 2,)."""
    moment = torch.zeros(d_ff, d_ff)
    rows, columns = torch.tril_indices(d_ff, d_ff).unbind()
    moment[rows, columns] = lower
    moment[columns, rows] = lower
    return moment
