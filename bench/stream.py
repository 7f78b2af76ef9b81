"""A long stream through several methods: the metrics table after the last batch, curves on the way, cost per batch.

    python bench/stream.py --data counterfact-edit.json --start 500 --limit 1000 --batch-size 100 \\
        --moments wikitext2-valid.txt --text wikitext2-test.txt --methods nse memit memit+memory alphaedit

A method's name may carry settings: memit+memory, nse+rounds=2. What a method gave is kept in --out as JSON, and a
method found there is not run again; the table and the plot are made of all that was asked for.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from timing import commit, machine_line, peak_mb, reset_peak

from fastedit import Editor, Source, Watch, load_edits
from fastedit.config import changed, parse_changes
from fastedit.evaluation.metrics import Measurement
from fastedit.methods.presets import preset_for
from fastedit.model.load import load_model
from fastedit.runs.reports import BatchReport

COLUMNS = {
    "efficacy": "ES",
    "generalization": "PS",
    "specificity": "NS",
    "score": "Score",
    "efficacy_top1": "top-1",
    "tokens_unchanged": "tokens unchanged",
    "fluency": "fluency",
    "perplexity": "perplexity",
}
CURVES = ("efficacy", "generalization", "specificity", "efficacy_top1", "tokens_unchanged", "perplexity")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="edit records, .jsonl or .json")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=["nse", "memit", "memit+memory", "alphaedit"])
    parser.add_argument("--set", nargs="*", default=[], dest="settings", help="settings of all methods: NAME=VALUE")
    parser.add_argument("--start", type=int, default=500)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--moments", type=Path, help="text for second moments; default: sampled from the model")
    parser.add_argument("--text", type=Path, help="text for perplexity")
    parser.add_argument("--fluency-prompts", type=int, default=50)
    parser.add_argument("--sample", type=int, default=100, help="first records of the stream, asked on the way")
    parser.add_argument("--every", type=int, default=2, help="batches between two points of the curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--plot", type=Path, help="PNG file for the curves")
    return parser.parse_args()


def make_editor(options: argparse.Namespace, name: str) -> Editor:
    """`name` is a method, with settings behind plus signs; a bare setting is switched on."""
    method, *settings = name.split("+")
    adapter = load_model(options.model)
    config = preset_for(method, adapter)
    own = [setting if "=" in setting else f"{setting}=true" for setting in settings]
    config = changed(config, parse_changes([*options.settings, *own]))
    return Editor(adapter, method, config, Source(options.moments, options.seed), options.seed)


class MemoryWatch(Watch):
    """Keeps each batch's own peak of resident memory too, in MB."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.peaks: list[float] = []

    def begin(self) -> None:
        super().begin()
        reset_peak()

    def after_batch(self, report: BatchReport, last: bool) -> None:
        self.peaks.append(peak_mb())
        super().after_batch(report, last)
        reset_peak()


class Stream:
    """The records of one stream and the unedited model's measurement, which all methods share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.edits = load_edits(options.data, start=options.start, limit=options.limit)
        self.text = None if options.text is None else options.text.read_text(encoding="utf-8")
        self.unedited: Measurement | None = None

    def measure(self, editor: Editor) -> Measurement:
        options = (self.text, 20_000, self.options.fluency_prompts, self.options.seed, None)
        return Measurement.take(editor.adapter, self.edits, *options)

    def run(self, name: str) -> dict[str, Any]:
        """Everything there is to say about one method."""
        options = self.options
        editor = make_editor(options, name)
        _ = editor.state
        if self.unedited is None:
            self.unedited = self.measure(editor)
        watch = MemoryWatch(editor, self.edits[: options.sample], every=options.every, text=self.text)
        run = editor.edit(self.edits, options.batch_size, watch=watch)
        return {
            "name": name,
            "machine": machine_line(),
            "commit": commit(),
            "config": editor.config.model_dump(mode="json"),
            "seconds_per_edit": run.seconds_per_edit,
            "batch_seconds": [report.seconds for report in run.batches],
            "peak_mb": max(watch.peaks),
            "batch_peak_mb": watch.peaks,
            "unedited": plain(self.unedited.metrics(self.unedited)),
            "edited": plain(self.measure(editor).metrics(self.unedited)),
            "curve": watch.to_dict(),
        }


def plain(metrics: Any) -> dict[str, Any]:
    return {name: {"value": metric.value, "error": metric.error} for name, metric in metrics.items()}


def growth(costs: list[float]) -> float:
    """Median cost of the last three batches over that of batches 2 to 4."""
    return statistics.median(costs[-3:]) / statistics.median(costs[1:4])


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| method | " + " | ".join(COLUMNS.values()) + " | s per edit | peak MB |",
        "| --- |" + " --- |" * (len(COLUMNS) + 2),
    ]
    rows = [("unedited", results[0]["unedited"], "–", "–")]
    rows += [(r["name"], r["edited"], f"{r['seconds_per_edit']:.2f}", f"{r['peak_mb']:.0f}") for r in results]
    for name, metrics, seconds, peak in rows:
        cells = [cell(metrics[column]["value"]) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {seconds} | {peak} |")
    return "\n".join(lines)


def cell(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}".removeprefix("0")


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), constrained_layout=True)
    for axis, metric in zip(axes.flat, CURVES, strict=True):
        for result in results:
            points = [(p["n_edits"], p["metrics"][metric]["value"]) for p in result["curve"]]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=result["name"])
        axis.set_title(COLUMNS[metric])
        axis.set_xlabel("edits")
    axes.flat[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    stream, results = Stream(options), []
    for name in options.methods:
        path = options.out / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(stream.run(name), indent=1), encoding="utf-8")
        results.append(json.loads(path.read_text(encoding="utf-8")))
        time, memory = (growth(results[-1][key]) for key in ("batch_seconds", "batch_peak_mb"))
        print(
            f"{name}: the last three batches took {time:.2f} times the time and {memory:.2f} times the memory of 2 to 4"
        )
    print(results[-1]["machine"])
    print(table(results))
    if options.plot is not None:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
