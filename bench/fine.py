"""FiNE in one batch against the published procedure edit by edit: time, neurons, steps and losses.

    python bench/fine.py --data counterfact.jsonl --limit 50 --baseline 50

The baseline runs --baseline edits, spread evenly over those of the batch. Both sides have the same settings
(neurons, steps, stop rule) and threads. Peak memory is that of the process while the batch runs. The metrics are
measured by `columns.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import published_fine
import torch
from timing import append_row, machine_line, peak_mb, reset_peak

from fastedit import Editor, EditSet, load_edits
from fastedit.config import changed, parse_changes
from fastedit.methods.columns.recipe import ColumnResult
from fastedit.model.tokens import whole_sequences


def settings_of(config: Any) -> published_fine.FineSettings:
    """The transcription's settings, equal to a FiNEConfig."""
    train = config.train
    return published_fine.FineSettings(
        k=config.neurons, frozen=config.frozen_layers, lr=train.lr, steps=train.steps, kl=train.kl_factor,
        repeat=train.repetition_factor, size=train.norm_factor, stop=train.stop_probability,
    )  # fmt: skip


def run_baseline(editor: Editor, edits: EditSet) -> tuple[float, list[published_fine.FineResult]]:
    """Seconds per edit of the published procedure, and its results."""
    model = editor.model
    sequences = whole_sequences(model.tokenizer, [e.prompt for e in edits], [e.target_new for e in edits])
    downs = [model.model.model.layers[layer].mlp.down_proj for layer in range(model.n_layers)]

    results = []
    started = time.perf_counter()
    for sequence in sequences:
        prompt = sequence.ids[: -len(sequence.targets)]
        results.append(
            published_fine.edit_one(model.model.eval(), downs, prompt, sequence.targets, settings_of(editor.config))
        )
    return (time.perf_counter() - started) / max(1, len(edits)), results


def train(editor: Editor, edits: Sequence[Any]) -> tuple[float, ColumnResult]:
    """Seconds per edit, and the result of one batch that is rolled back."""
    state = editor.state
    started = time.perf_counter()
    with editor.journal.trial() as trial, torch.no_grad():
        result: Any = editor.recipe.run(editor.start, state, edits, trial)
        seconds = (time.perf_counter() - started) / len(edits)
    return seconds, result


def compare(result: ColumnResult, baseline: Sequence[published_fine.FineResult], picked: Sequence[int]) -> str:
    """How many of the picked edits have the same neurons and steps, and the largest relative difference of a loss."""
    same_neurons, same_steps = 0, 0
    worst = 0.0
    for edit, wanted in zip(picked, baseline, strict=True):
        here = result.slots.edits == edit
        slots = zip(result.slots.layers[here].tolist(), result.slots.neurons[here].tolist(), strict=True)
        same_neurons += set(slots) == set(wanted.slots)
        same_steps += int(result.steps[edit]) == wanted.steps
        for ours, (theirs, _) in zip(result.trained.curve[:, edit].tolist(), wanted.losses, strict=False):
            worst = max(worst, abs(ours - theirs) / abs(theirs))

    n = len(baseline)
    return f"same neurons {same_neurons}/{n}, same steps {same_steps}/{n}, losses differ by at most {worst:.1e}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", default="fine", choices=["fine", "kne", "kn"])
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--baseline", type=int, default=10, help="edits for the published procedure (FiNE alone)")
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--record", action="store_true", help="append a row to bench/results")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    print(machine_line())
    editor = Editor.from_pretrained(options.model, options.method, progress=False)
    config = changed(editor.config, parse_changes(options.settings))
    editor = Editor(editor.model, options.method, config, progress=False)
    edits = load_edits(options.data, start=options.start, limit=options.limit)

    n_baseline = min(options.baseline, len(edits)) if options.method == "fine" else 0
    picked = [i * len(edits) // n_baseline for i in range(n_baseline)]
    theirs, baseline = run_baseline(editor, EditSet(tuple(edits[i] for i in picked))) if picked else (0.0, [])

    reset_peak()
    ours, result = train(editor, edits)
    mean = float(result.steps.float().mean())
    print(f"{ours:.3f} s per edit in one batch of {len(edits)}, {mean:.1f} steps on average")
    print(f"peak memory {peak_mb():.0f} MB")

    if baseline:
        steps = sum(one.steps for one in baseline) / len(baseline)
        own = float(result.steps[picked].float().mean())
        # There is one forward more than steps: it finds the edit finished.
        per_pass = theirs / (steps + 1) / (ours / (mean + 1))
        print(
            f"{theirs:.3f} s per edit one by one ({len(picked)} edits, {steps:.1f} steps; in the batch {own:.1f}):"
            f" {theirs / ours:.1f} times, {per_pass:.1f} times per pass"
        )
        print(compare(result, baseline, picked))

    if options.record:
        append_row(
            benchmark=f"editing {options.method}", backend="torch", shape=f"batch {len(edits)}", dtype="float32",
            metric="seconds per edit", median=round(ours, 4), unit="s", peak_mb=round(peak_mb()),
        )  # fmt: skip


if __name__ == "__main__":
    main()
