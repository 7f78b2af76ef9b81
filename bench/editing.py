"""This engine against the published procedure of a method (published.py): same records, templates, settings, steps.

Both edit fresh copies of one model. Edits of the baseline and batches of the engine take turns, so that a change of
the machine's speed meets both. No ratio is printed unless values and updates agree: cosine of the value's change above
0.999, loss within 1e-3, and the update within 1e-3 of its norm, each side from its own values. Values in half
precision cannot agree coordinate by coordinate (Adam's first step is a sign step): there the mean loss must, within
0.02 or 1 %, and `stream.py` compares the metrics. A model in half precision is held to the same.

    python bench/editing.py --data counterfact-edit.json --start 500 --method nse
    python bench/editing.py --random llama-3-8b --device cuda --dtype bfloat16

With --random, weights, records and second moments are made here (random_model.py), every edit takes all steps, both
sides are run once before they are timed, and the published closed form is timed on the whole batch: its dense solves
are shared by the edits.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import published
import published_siblings as siblings
import torch
from measure import Rates
from random_model import SHAPES, random_model, random_moments, records
from timing import append_row, machine_line, matmul_rate, peak_mb, reset_peak
from torch import Tensor

from fastedit import Editor, EditSet, Source, load_edits
from fastedit.config import changed, parse_changes
from fastedit.methods.closed_form.recipe import Batch
from fastedit.methods.closed_form.values import optimise_values
from fastedit.methods.presets import load_preset
from fastedit.model.load import load_model
from fastedit.weights.trial import Trial


@dataclass
class Baseline:
    """The published procedure's results: seconds per edit of each value, of the closed form, and what came out."""

    value_seconds: list[float] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    update_seconds: float = 0.0
    totals: dict[int, Tensor] = field(default_factory=dict)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="edit records, .jsonl or .json")
    what.add_argument("--random", choices=tuple(SHAPES), help="random weights of this shape, and invented records")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    parser.add_argument("--method", choices=("nse", "memit", "alphaedit"), default="nse")
    parser.add_argument("--value-dtype", choices=("model", "bfloat16"), default="model", help="of the engine's values")
    parser.add_argument("--start", type=int, default=500, help="first record")
    parser.add_argument("--edits", type=int, default=100, help="records the engine edits as one batch")
    parser.add_argument("--baseline-edits", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2, help="batches of the engine")
    parser.add_argument("--moments", type=Path, help="text for second moments; default: sampled from the model")
    parser.add_argument("--moment-tokens", type=int, default=20_000)
    parser.add_argument("--token-budget", type=int, help="live rows optimised together; default: the preset's")
    parser.add_argument("--set", nargs="*", default=[], dest="settings", metavar="NAME=VALUE", help="other settings")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-rows", action="store_true", help="do not append to bench/results")
    return parser.parse_args(argv)


def make_editor(options: argparse.Namespace) -> Editor:
    # Equal steps: our own stop rule is off, and the published one stays on.
    value: dict[str, Any] = {"stop_after_top1": None, "dtype": options.value_dtype}
    changes: dict[str, Any] = {"moments": {"tokens": options.moment_tokens}, "value": value}
    if options.token_budget:
        value["token_budget"] = options.token_budget
    if options.random:
        model = random_model(options.random, getattr(torch, options.dtype), options.device)
        # Every edit takes every step and is written, whatever a random model's losses and norms are.
        value["stop_loss"] = 0.0
        bounds = {"residual_min": 0.0, "residual_max": float("inf")} if options.method == "nse" else {}
        config = changed(load_preset(options.method, "llama-3-8b"), {**changes, **bounds})
        editor = Editor(model, options.method, config, random_moments(model, config.layers), progress=False)
    else:
        model = load_model(options.model, options.dtype, options.device)
        editor = Editor(model, options.method, moments=Source(options.moments), progress=False)
        editor.config = changed(editor.config, changes)
    editor.config = changed(editor.config, parse_changes(options.settings))
    return editor


def wait(editor: Editor) -> None:
    """Until the device has done what it was told."""
    if editor.adapter.device.type == "cuda":
        torch.cuda.synchronize()


class Meter:
    """Rate of float32 products on the processor, of bf16 products on a GPU; peak memory in MB of either."""

    def __init__(self, device: torch.device) -> None:
        self.rates: list[float] = []
        self.on_gpu = device.type == "cuda"
        self.gpu = Rates("cuda") if self.on_gpu else None

    def look(self) -> None:
        """Measure the rate once more."""
        if self.gpu is None:
            self.rates.append(matmul_rate())
        else:
            self.gpu.products.clear()
            self.gpu.measure(torch.bfloat16)
            self.rates.append(self.gpu.products[torch.bfloat16])

    def reset(self) -> None:
        """Start a new peak."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak()

    def peak(self) -> float:
        """The peak since `reset`."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else peak_mb()

    def __str__(self) -> str:
        kind = "bfloat16" if self.on_gpu else "float32"
        return f"{kind} matmul during the run: {min(self.rates):.0f} to {max(self.rates):.0f} GFLOP/s"


def settings_of(config: Any) -> published.PublishedSettings:
    return published.PublishedSettings(
        layers=config.layers,
        steps=config.value.steps,
        lr=config.value.lr,
        # What a sibling of NSE does not have, as the value that switches it off.
        covariance_weight=getattr(config, "covariance_weight", 0.0),
        mass=getattr(config, "mass", 1.0),
        residual_min=getattr(config, "residual_min", 0.0),
        residual_max=getattr(config, "residual_max", float("inf")),
        rounds=getattr(config, "rounds", 1),
        weight_decay=config.value.weight_decay,
        kl_factor=config.value.kl_factor,
        clamp=config.value.clamp,
        stop_loss=config.value.stop_loss,
    )


def baseline_values(found: Baseline, editor: Editor, twin: Any, requests: list[Any]) -> None:
    for request in requests:
        started = time.perf_counter()
        result = published.optimise_value(
            twin, editor.tokenizer, request, editor.state.templates, settings_of(editor.config)
        )
        found.value_seconds.append(time.perf_counter() - started)
        found.values.append(result.value)
        found.hidden.append(result.hidden0)
        found.losses.append(result.losses)


def baseline_update(editor: Editor, twin: Any, requests: list[Any], values: Tensor) -> tuple[dict[int, Tensor], float]:
    """What the published closed form adds to each layer of `twin`, and its seconds per edit."""
    config, state, width = editor.config, editor.state, editor.adapter.d_ff
    common = (twin, editor.tokenizer, requests, values, state.templates)
    history = {layer: torch.zeros(width, width, device=editor.adapter.device) for layer in config.layers}
    if editor.method.name == "alphaedit":
        # Offline in the released code too, so outside the time.
        projectors = {n: siblings.projector(moment, config.null_threshold) for n, moment in state.moments.items()}
    wait(editor)
    started = time.perf_counter()
    if editor.method.name == "nse":
        totals = published.nse_batch(*common, state.moments, history, settings_of(config))
    elif editor.method.name == "memit":
        past = history if config.memory else None
        totals = siblings.memit_batch(*common, state.moments, settings_of(config), past)
    else:
        totals = siblings.alphaedit_batch(*common, projectors, history, config.layers, config.ridge)
    wait(editor)
    return totals, (time.perf_counter() - started) / len(requests)


def like_values(found: Baseline, editor: Editor, twin: Any, requests: list[Any]) -> Tensor:
    """Values for all requests (n, d_model): their hidden states, moved as the timed edits' were, in turn."""
    hidden = published.compute_hidden(twin, editor.tokenizer, requests, editor.config.layers[-1])
    change = torch.stack(found.values) - torch.stack(found.hidden)
    return hidden + change[torch.arange(len(requests), device=change.device) % len(change)]


def disagreement(editor: Editor, found: Baseline, edits: EditSet) -> list[str]:
    """Why no ratio may be printed; empty when the engine's values and updates are the published ones."""
    if editor.config.value.dtype != "model" or editor.adapter.dtype != torch.float32:
        return half_disagreement(editor, found, edits)
    ours = optimise_values(editor.adapter, edits, editor.state.templates, editor.config.layers[-1], editor.config.value)
    problems = []
    for i, edit in enumerate(edits):
        change = torch.cosine_similarity(ours.z[i] - ours.hidden[i], found.values[i] - found.hidden[i], dim=0)
        if not float(change) > 0.999:
            problems.append(f"case {edit.case_id}: cosine of the value's change is {float(change):.6f}")
        last = last_loss(found.losses[i], editor.config.value.steps)
        if not abs(float(ours.losses[i]) - last) < 1e-3:
            problems.append(f"case {edit.case_id}: loss {float(ours.losses[i]):.5f}, published {last:.5f}")
    before = {layer: editor.weights.current(layer).clone() for layer in editor.config.layers}
    editor.edit(edits)
    for layer, total in found.totals.items():
        error = float((editor.weights.current(layer) - before[layer] - total).norm() / total.norm())
        print(f"  layer {layer}: update differs by {error:.1e} of its norm")
        if not error < 1e-3:
            problems.append(f"layer {layer}: update differs by {error:.1e} of its norm")
    editor.undo()
    return problems


def last_loss(losses: list[float], steps: int) -> float:
    """The last loss after which the published loop could still change the value: its last forward only prints."""
    return losses[-1] if len(losses) < steps else losses[-2]


def half_disagreement(editor: Editor, found: Baseline, edits: EditSet) -> list[str]:
    """The gate for values in half precision, on the mean loss alone."""
    batch = Batch(editor.adapter, edits, editor.config, editor.state, Trial(editor.weights))
    ours = float(batch.values().losses.mean())
    theirs = statistics.mean(last_loss(losses, editor.config.value.steps) for losses in found.losses)
    print(f"  mean loss {ours:.4f}, published {theirs:.4f}")
    # A random model's loss is near log(vocabulary), where rounding alone is as large as the bound for a real one.
    return [] if abs(ours - theirs) < max(0.02, 0.01 * theirs) else [f"mean loss {ours:.4f}, published {theirs:.4f}"]


def request_of(edit: Any) -> published.Request:
    return published.Request(edit.prompt, edit.subject_span[1], edit.subject, edit.target_new)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    print(machine_line(options.device))
    editor = make_editor(options)
    edits = (
        records(options.edits) if options.random else load_edits(options.data, start=options.start, limit=options.edits)
    )
    few = edits[: options.baseline_edits]
    requests = [request_of(edit) for edit in few]
    twin = copy.deepcopy(editor.model)
    _ = editor.state
    found, engine, peaks, meter = Baseline(), [], [], Meter(editor.adapter.device)
    if options.random:
        baseline_values(Baseline(), editor, twin, requests[:1])
        editor.edit(few, batch_size=len(few))
        editor.undo()
    meter.look()
    pieces = options.repeats + 1
    for piece in range(pieces):
        share = requests[len(requests) * piece // pieces : len(requests) * (piece + 1) // pieces]
        baseline_values(found, editor, twin, share)
        meter.look()
        if piece < options.repeats:
            meter.reset()
            run = editor.edit(edits, batch_size=len(edits))
            peaks.append(meter.peak())
            engine.append(run.seconds_per_edit)
            print(f"  engine: {run.seconds_per_edit:.4f} s per edit, written {run.batches[0].written}")
            editor.undo()
            meter.look()
    found.totals, found.update_seconds = baseline_update(editor, twin, requests, torch.stack(found.values))
    if options.random:
        everyone = [request_of(edit) for edit in edits]
        _, found.update_seconds = baseline_update(editor, twin, everyone, like_values(found, editor, twin, everyone))
    report(options, editor, found, engine, peaks, meter, disagreement(editor, found, few))


def report(
    options: argparse.Namespace,
    editor: Editor,
    found: Baseline,
    engine: list[float],
    peaks: list[float],
    meter: Meter,
    problems: list[str],
) -> None:
    value = statistics.median(found.value_seconds)
    baseline = statistics.mean(found.value_seconds) + found.update_seconds
    ours = statistics.median(engine)
    print(
        f"published: {baseline:.2f} s per edit (values {statistics.mean(found.value_seconds):.2f}, median {value:.2f},"
    )
    print(
        f"           {min(found.value_seconds):.2f} to {max(found.value_seconds):.2f}; rest {found.update_seconds:.2f})"
    )
    print(f"engine:    {ours:.4f} s per edit ({min(engine):.4f} to {max(engine):.4f}), peak {max(peaks):.0f} MB")
    print(meter)
    if problems:
        raise SystemExit("no ratio, results disagree:\n" + "\n".join(problems))
    print(f"ratio:     {baseline / ours:.1f}")
    if not options.no_rows:
        name = f"{options.random} random weights" if options.random else options.model
        shape = f"{name} {options.method} B={options.edits} steps={editor.config.value.steps}"
        shared = {"benchmark": "editing", "shape": shape, "gemm_gflops": round(max(meter.rates))}
        half = options.value_dtype != "model"
        for backend, dtype, times in (
            ("published", options.dtype, [t + found.update_seconds for t in found.value_seconds]),
            ("engine", f"values {options.value_dtype}" if half else options.dtype, engine),
        ):
            path = append_row(
                options.device,
                **shared,
                dtype=dtype,
                backend=backend,
                metric="seconds per edit",
                median=round(statistics.median(times), 4),
                low=round(min(times), 4),
                high=round(max(times), 4),
                unit="s",
                peak_mb=round(max(peaks)) if backend == "engine" else "",
            )
        print(f"rows appended to {path}")


if __name__ == "__main__":
    main()
