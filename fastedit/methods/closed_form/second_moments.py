"""Second moments C = mean of k k^T over background keys, for all wanted layers in one pass that stops after the last.

Where the sums of all layers do not fit into memory, there are several passes, each for as many layers as fit.

Each layer has a safetensors file of its own with the lower triangle, packed, and its provenance: the weights that
produce the keys, the layer, the source of the text, the number of tokens and the window. The file is named by a hash
of the provenance. A second moment is therefore computed once, and never taken for that of another model or text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastedit.config import MomentConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.model.packed_attention import CausalPlan
from fastedit.ops.gram_update import gram_update
from fastedit.runtime.available_memory import Available, available_bytes, gigabytes
from fastedit.runtime.cache import cache_folder, store_in_cache
from fastedit.runtime.hashing import tensor_bytes
from fastedit.runtime.places import PlaceError, check_room, check_writable
from fastedit.runtime.progress import Show, track
from fastedit.runtime.words import grouped, told_by

log = logging.getLogger(__name__)

FORMAT = "fastedit second moment 1"

# Rows and columns that are mirrored at a time: both tiles stay in the cache.
TILE = 128


class BadMoments(ValueError):
    """A file of second moments is damaged, or it belongs to another model, layer or text."""


class StoredMoments(Mapping[int, Tensor]):
    """Second moments that lie on the disk: layer -> C (d_ff, d_ff) float32, read and checked each time it is asked for.

    paths, origins: layer -> file, and the provenance that it must have
    device: of what is returned
    A layer raises BadMoments for a file that is gone or does not hold what its name says."""

    def __init__(
        self,
        paths: Mapping[int, Path],
        origins: Mapping[int, dict[str, str]],
        d_ff: int,
        device: torch.device,
    ) -> None:
        self.paths = dict(paths)
        self.origins = dict(origins)
        self.d_ff = d_ff
        self.device = device

    def __getitem__(self, layer: int) -> Tensor:
        return load_moment(self.paths[layer], self.d_ff, self.origins[layer]).to(self.device)

    def __iter__(self) -> Iterator[int]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


class GivenMoments(Mapping[int, Tensor]):
    """Second moments that the caller gave, of the wanted layers, moved to a device when they are asked for.

    moments: layer -> C (d_ff, d_ff), of these layers at least"""

    def __init__(self, moments: Mapping[int, Tensor], layers: Sequence[int], device: torch.device) -> None:
        self.moments = moments
        self.layers = tuple(layers)
        self.device = device

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self.layers:
            raise KeyError(layer)
        return self.moments[layer].to(self.device)

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def second_moments(
    model: ModelAdapter,
    layers: Sequence[int],
    source: Source,
    config: MomentConfig,
    folder: Path | None = None,
    show: Show = None,
    available: Available = available_bytes,
) -> dict[int, Tensor]:
    """Second moments by layer, each C (d_ff, d_ff) float32 on `ModelAdapter.device`.

    Stored ones are loaded; the others are computed in one pass and stored, or in several passes of as many layers as
    fit into memory.

    folder: where they are stored; None = in the cache
    show: True or False shows or hides the progress bar, None as the terminal can
    available: tells how much memory can be taken
    Raises BadMoments for a stored file that does not hold what its name says, ValueError for an empty text, and
    PlaceError, before anything is computed, for a folder that was named and cannot be written."""
    stored = _stored(model, layers, source, config, folder)
    computed: dict[int, Tensor] = {}

    def take(layer: int, moment: Tensor) -> None:
        computed[layer] = moment

    _compute_missing(model, stored, source, config, show, available, required=folder is not None, take=take)
    return {layer: computed.pop(layer).to(model.device) if layer in computed else stored[layer] for layer in layers}


def stored_moments(
    model: ModelAdapter,
    layers: Sequence[int],
    source: Source,
    config: MomentConfig,
    folder: Path | None = None,
    show: Show = None,
    available: Available = available_bytes,
) -> StoredMoments:
    """As `second_moments`, but they stay on the disk, and each is read when it is asked for.

    Raises also PlaceError or OSError where they cannot be stored."""
    stored = _stored(model, layers, source, config, folder)
    try:
        _compute_missing(model, stored, source, config, show, available, required=True, take=None)
    except PlaceError as error:
        if folder is not None:
            raise
        raise PlaceError(
            f"{error} (FASTEDIT_CACHE): second moments of all edited layers do not fit into memory, so they have to lie"
            " on the disk"
        ) from error
    return stored


def _stored(
    model: ModelAdapter, layers: Sequence[int], source: Source, config: MomentConfig, folder: Path | None
) -> StoredMoments:
    """Where the second moments of the layers lie, or will."""
    folder = folder or cache_folder() / "moments"
    origins = {layer: provenance(model, layer, source, config) for layer in layers}
    paths = {layer: folder / f"{content_key(origin)}.safetensors" for layer, origin in origins.items()}

    return StoredMoments(paths, origins, model.d_ff, model.device)


def _compute_missing(
    model: ModelAdapter,
    stored: StoredMoments,
    source: Source,
    config: MomentConfig,
    show: Show,
    available: Available,
    required: bool,
    take: Callable[[int, Tensor], None] | None,
) -> None:
    """Compute and store the second moments that have no file yet.

    required: raise where one cannot be stored, before anything is computed where that can be seen
    take: given each that was computed, as its file holds it"""
    # os.path, unlike Path.exists, takes a folder that may not be entered for one that holds nothing.
    missing = [layer for layer in stored if not os.path.isfile(stored.paths[layer])]
    if not missing:
        return

    if required:
        folder = stored.paths[missing[0]].parent
        check_writable(folder)
        check_room(folder, len(missing) * 4 * model.d_ff * (model.d_ff + 1) // 2)
    windows = source.windows(model, config, show)
    n_tokens = sum(len(window) for window in windows)
    if n_tokens < model.d_ff:
        _warn_of_few(n_tokens, model.d_ff)

    for group in _groups(model, missing, config.token_budget, available):
        with track(n_tokens, f"second moments of layers {_range(group)}", "tokens", show) as advance:
            moments = accumulate(model, group, windows, config.token_budget, advance)
        for layer in group:
            origin = {**stored.origins[layer], "tokens_used": str(n_tokens)}
            moment = save_moment(stored.paths[layer], moments.pop(layer), origin, required)
            _check_numbers(stored.paths[layer], moment)
            if take is not None:
                take(layer, moment)


def _groups(model: ModelAdapter, layers: list[int], token_budget: int, available: Available) -> list[list[int]]:
    """The layers in groups whose sums fit into memory together, at least one layer each. Several groups are told."""
    left = available(model.device)
    # The sums of a layer; beside them a triangle and a copy while one is stored, and the rows of a batch of tokens.
    one_sum = 4 * model.d_ff**2
    beside = 6 * model.d_ff**2 + token_budget * (24 * model.d_ff + 32 * model.d_model)
    together = len(layers) if left is None else min(len(layers), max(1, (left - beside) // one_sum))

    if together < len(layers):
        n_passes = -(-len(layers) // together)
        log.warning(
            "second moments of %d layers are summed in %d passes over the text, because %s of memory are available and"
            " one pass needs %s",
            len(layers),
            n_passes,
            gigabytes(left or 0),
            gigabytes(len(layers) * one_sum + beside),
        )
    return [layers[start : start + together] for start in range(0, len(layers), together)]


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
    lower = _packed(moment.cpu())
    digest = hashlib.sha256(tensor_bytes(lower)).hexdigest()

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
    # In parts, because each takes two copies.
    finite = all(bool(torch.isfinite(rows).all()) for rows in torch.chunk(moment, 64))
    if not finite or not bool((moment.diagonal() >= 0).all()):
        raise BadMoments(f"{path}: holds NaN, Inf or a negative diagonal")


def _check_file(path: Path, metadata: dict[str, str], lower: Tensor, d_ff: int, origin: dict[str, str]) -> None:
    """Raises BadMoments where format, size, checksum or provenance of a file are not the wanted ones."""
    if metadata.get("format") != FORMAT:
        raise BadMoments(f"{path}: format {metadata.get('format')!r}, wanted {FORMAT!r}")
    if metadata.get("d_ff") != str(d_ff) or lower.numel() != d_ff * (d_ff + 1) // 2:
        raise BadMoments(f"{path}: made for d_ff {metadata.get('d_ff')}, the model has {d_ff}")
    if hashlib.sha256(tensor_bytes(lower)).hexdigest() != metadata.get("sha256"):
        raise BadMoments(f"{path}: its numbers do not match their checksum; delete the file to compute it again")

    for name, wanted in origin.items():
        if metadata.get(name) != wanted:
            raise BadMoments(f"{path}: {name} is {metadata.get(name)!r}, wanted {wanted!r}")


def _packed(moment: Tensor) -> Tensor:
    """The lower triangle of C (d_ff, d_ff), row by row, (d_ff * (d_ff + 1) / 2,)."""
    d_ff = moment.shape[0]
    lower = moment.new_empty(d_ff * (d_ff + 1) // 2)
    for row in range(d_ff):
        start = row * (row + 1) // 2
        lower[start : start + row + 1] = moment[row, : row + 1]
    return lower


def _symmetric(lower: Tensor, d_ff: int) -> Tensor:
    """The symmetric matrix (d_ff, d_ff) of a packed lower triangle (d_ff * (d_ff + 1) / 2,).

    Indices of all elements would take four times the matrix."""
    moment = torch.zeros(d_ff, d_ff)
    for row in range(d_ff):
        start = row * (row + 1) // 2
        moment[row, : row + 1] = lower[start : start + row + 1]

    below = torch.ones(TILE, TILE, dtype=torch.bool).tril()
    for start in range(0, d_ff, TILE):
        rows = slice(start, min(start + TILE, d_ff))
        for left in range(0, start, TILE):
            columns = slice(left, left + TILE)
            moment[columns, rows] = moment[rows, columns].T

        square = moment[rows, rows]
        # A sum of two triangles would lose the sign of a zero.
        square.copy_(torch.where(below[: len(square), : len(square)], square, square.T))
    return moment
