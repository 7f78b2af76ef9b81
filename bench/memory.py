"""Time and peak memory of one batch on a model that fills most of the machine, stage by stage.

    python bench/memory.py --random llama-3-8b --dtype bfloat16 --edits 4

Weights, tokenizer and records are made here (random_model.py), and so are the second moments, one layer at a time in
files: what an edit costs depends on none of them. With --moment-tokens second moments are computed from a text of
invented sentences instead. Every edit takes all its steps and is written. The peak is that of the whole process, from
its start. --available N has the editor believe that N GB of memory are available, to see both ways of holding.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from random_model import SHAPES, random_model, records, sentence
from timing import append_row, machine_line, matmul_rate, resident_mb
from torch import Tensor

from fastedit import METHODS, Editor, Source
from fastedit.config import changed, parse_changes
from fastedit.methods.closed_form.second_moments import FORMAT, StoredMoments, save_moment
from fastedit.methods.presets import load_preset
from fastedit.model.adapter import ModelAdapter


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", choices=tuple(SHAPES), default="llama-3-8b", help="shape of the model")
    parser.add_argument("--depth", type=int, help="layers of the model, in place of the shape's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the model")
    parser.add_argument("--method", choices=("nse", "memit", "alphaedit"), default="nse")
    parser.add_argument("--edits", type=int, default=4)
    parser.add_argument("--batches", type=int, default=1, help="batches of so many edits, one after the other")
    parser.add_argument("--moment-tokens", type=int, help="compute second moments from so many tokens")
    parser.add_argument("--available", type=float, metavar="GB", help="what the editor takes for the available memory")
    parser.add_argument("--set", nargs="*", default=[], dest="settings", metavar="NAME=VALUE", help="other settings")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-rows", action="store_true", help="do not append to bench/results")
    return parser.parse_args(argv)


def peak_gb() -> float:
    """Peak resident memory of the process in GB, 10^9 bytes; Linux counts in units of 1024."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Tells how long the block took, the memory after it, and the peak so far."""
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    print(
        f"{name:<24} {seconds:8.1f} s   now {resident_mb() * 2**20 / 1e9:5.2f} GB   peak {peak_gb():5.2f} GB",
        flush=True,
    )


def made_up_moments(model: ModelAdapter, layers: tuple[int, ...], folder: Path) -> StoredMoments:
    """Second moments of random keys in files, of full rank: 512 directions above a floor."""
    paths, origins = {}, {}
    for layer in layers:
        keys = torch.randn(512, model.d_ff, generator=torch.Generator().manual_seed(layer))
        moment = keys.T @ keys
        moment.div_(len(keys)).diagonal().add_(0.1)
        paths[layer] = folder / f"{layer}.safetensors"
        origins[layer] = {"format": FORMAT, "layer": str(layer), "source": "made up"}
        save_moment(paths[layer], moment, origins[layer])
    return StoredMoments(paths, origins, model.d_ff, model.device)


def background(tokens: int, folder: Path) -> Source:
    """A text of invented sentences, long enough for so many tokens."""
    draw = random.Random(1)
    path = folder / "background.txt"
    path.write_text("\n".join(sentence(draw) for _ in range(tokens // 6)), encoding="utf-8")
    return Source(path)


def make_editor(options: argparse.Namespace, model: ModelAdapter, folder: Path) -> Editor:
    value: dict[str, Any] = {"stop_after_top1": None, "stop_loss": 0.0}
    changes: dict[str, Any] = {"value": value}
    if options.moment_tokens:
        changes["moments"] = {"tokens": options.moment_tokens}
    if options.method == "nse":
        changes |= {"residual_min": 0.0, "residual_max": float("inf")}
    config = changed(changed(load_preset(options.method, "llama-3-8b"), changes), parse_changes(options.settings))

    moments: Mapping[int, Tensor] | Source
    if options.moment_tokens:
        moments = background(options.moment_tokens, folder)
    else:
        with stage("second moments made up"):
            moments = made_up_moments(model, config.layers, folder)

    method = METHODS[options.method]
    if options.available is not None:
        limited = f"{method.name} in {options.available:g} GB"
        method = replace(method, name=limited, available=lambda device: round(options.available * 1e9))
    return Editor(model, method, config, moments, progress=False)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(options.threads)
    print(machine_line("cpu"), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        with stage("model"):
            model = random_model(options.random, getattr(torch, options.dtype), "cpu", n_layers=options.depth)
        editor = make_editor(options, model, Path(folder))
        with stage("prepared"):
            _ = editor.state

        seconds = []
        for number in range(options.batches):
            edits = records(options.edits, seed=number)
            with stage(f"batch {number}, {options.edits} edits"):
                seconds.append(editor.edit(edits, batch_size=options.edits).seconds_per_edit)
        with stage("undone"):
            editor.undo()

    print(f"{statistics.median(seconds):.1f} s per edit, peak {peak_gb():.2f} GB (10^9 bytes)")
    if not options.no_rows:
        row(options, editor, seconds)


def row(options: argparse.Namespace, editor: Editor, seconds: list[float]) -> None:
    """Append what was measured to bench/results. peak_mb is in units of 2^20 bytes, as in every row."""
    name = options.random + (f" cut to {options.depth} layers" if options.depth else "")
    shape = f"{name} random weights {options.method} B={options.edits} steps={editor.config.value.steps}"
    path = append_row(
        "cpu",
        benchmark="memory",
        backend="engine",
        shape=shape,
        dtype=options.dtype,
        metric="seconds per edit",
        median=round(statistics.median(seconds), 2),
        low=round(min(seconds), 2),
        high=round(max(seconds), 2),
        unit="s",
        peak_mb=round(peak_gb() * 1e9 / 2**20),
        gemm_gflops=round(matmul_rate()),
    )
    print(f"row appended to {path}")


if __name__ == "__main__":
    main()
