"""Values in bfloat16 against float32: the same edits, batches and templates, metrics compared record by record.

    python bench/precision.py --data counterfact-edit.json --start 500 --limit 200 --text wikitext2-test.txt

Prints per metric the mean of both, the paired difference, and the standard error of that difference; a difference
beyond two standard errors is marked. Then the seconds per edit of both, each batch of one followed by the same batch of
the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from pathlib import Path

import torch
from timing import append_row, machine_line, matmul_rate

from fastedit import Editor, EditSet, Source, load_edits
from fastedit.config import changed
from fastedit.evaluation.metrics import Measurement
from fastedit.methods.presets import preset_for
from fastedit.model.load import load_model

COMPARED = ("efficacy", "efficacy_top1", "generalization", "specificity", "tokens_unchanged")
DTYPES = ("model", "bfloat16")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="edit records, .jsonl or .json")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="nse")
    parser.add_argument("--start", type=int, default=500)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--moments", type=Path, help="text for second moments; default: sampled from the model")
    parser.add_argument("--text", type=Path, help="text for perplexity")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-rows", action="store_true", help="do not append to bench/results")
    return parser.parse_args()


def make_editor(options: argparse.Namespace, dtype: str) -> Editor:
    adapter = load_model(options.model)
    config = preset_for(options.method, adapter)
    config = changed(config, {"value": {"dtype": dtype}})
    return Editor(adapter, options.method, config, Source(options.moments), progress=False)


def by_record(after: Measurement, before: Measurement, metric: str) -> list[float | None]:
    """The metric of each record alone."""
    return [
        dataclasses.replace(after, edits=[edit]).metrics(dataclasses.replace(before, edits=[edit]))[metric].value
        for edit in after.edits
    ]


def compare(full: list[float | None], half: list[float | None]) -> tuple[float, float, float, float]:
    """Means of both, mean paired difference, its standard error."""
    pairs = [(a, b) for a, b in zip(full, half, strict=True) if a is not None and b is not None]
    differences = [b - a for a, b in pairs]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    means = (statistics.mean(column) for column in zip(*pairs, strict=True))
    return (*means, statistics.mean(differences), error)


def report(edits: EditSet, before: Measurement, after: dict[str, Measurement]) -> None:
    print(f"{'metric':<20}{'float32':>9}{'bfloat16':>10}{'difference':>12}{'its error':>11}")
    for metric in COMPARED:
        columns = [by_record(after[dtype], before, metric) for dtype in DTYPES]
        full, half, difference, error = compare(*columns)
        mark = "" if abs(difference) <= 2 * error or difference == 0 else "  beyond two standard errors"
        print(f"{metric:<20}{full:>9.3f}{half:>10.3f}{difference:>+12.3f}{error:>11.3f}{mark}")
    if before.perplexity is not None:
        shares = [(after[dtype].perplexity or math.nan) / before.perplexity for dtype in DTYPES]
        print(f"{'perplexity, times':<20}{shares[0]:>9.3f}{shares[1]:>10.3f}")


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    print(machine_line())
    edits = load_edits(options.data, start=options.start, limit=options.limit)
    text = None if options.text is None else options.text.read_text(encoding="utf-8")
    editors = {dtype: make_editor(options, dtype) for dtype in DTYPES}
    seconds: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for editor in editors.values():
        _ = editor.state
    before = Measurement.take(editors["model"].model, edits, text, 20_000, 0, 0, False)
    rates = [matmul_rate()]
    for start in range(0, len(edits), options.batch_size):
        for dtype, editor in editors.items():
            run = editor.edit(edits[start : start + options.batch_size], options.batch_size)
            seconds[dtype].append(run.seconds_per_edit)
            rates.append(matmul_rate())
    report(edits, before, {d: Measurement.take(e.model, edits, text, 20_000, 0, 0, False) for d, e in editors.items()})
    median = {dtype: statistics.median(each) for dtype, each in seconds.items()}
    full, half = median["model"], median["bfloat16"]
    print(f"seconds per edit {full:.3f} and {half:.3f}: {full / half:.2f} times")
    print(f"float32 matmul during the run: {min(rates):.0f} to {max(rates):.0f} GFLOP/s")
    if not options.no_rows:
        for dtype, each in seconds.items():
            append_row(
                benchmark="precision",
                backend="engine",
                shape=f"{options.model} {options.method} B={options.batch_size}",
                dtype="float32" if dtype == "model" else "values bfloat16",
                metric="seconds per edit",
                median=round(median[dtype], 3),
                low=round(min(each), 3),
                high=round(max(each), 3),
                unit="s",
                gemm_gflops=round(max(rates)),
            )


if __name__ == "__main__":
    main()
