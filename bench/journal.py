"""What a run directory costs: its share of the run time, bytes per edit, and how long a resume takes.

    python bench/journal.py --data counterfact-edit.json --folder runs/cost --limit 200
    python bench/journal.py --data counterfact-edit.json --folder runs/many --limit 1000 --set value.steps=2

The first edits as a user would; its share is what counts. The second makes a long run quickly: what a resume costs does
not depend on how its values were found. The resume starts from the unedited weights, checks every byte, replays, and
must come out at the same bits.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import append_row, machine_line

from fastedit import Editor, Source, load_edits
from fastedit.config import changed, parse_changes
from fastedit.methods.presets import preset_for
from fastedit.model.load import load_model
from fastedit.runs.recorder import Recorder


def clocked(method: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The method, its seconds appended to `spent`."""

    @functools.wraps(method)
    def timed(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*args, **options)
        finally:
            spent.append(time.perf_counter() - started)

    return timed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="edit records, .jsonl or .json")
    parser.add_argument("--folder", type=Path, required=True, help="the run directory, new or empty")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="nse")
    parser.add_argument("--start", type=int, default=500)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--moments", type=Path, help="text for second moments; default: sampled from the model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--record", action="store_true", help="append rows to bench/results")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    print(machine_line())
    model = load_model(options.model)
    config = preset_for(options.method, model)
    config = changed(config, parse_changes(options.settings))
    editor = Editor(model, options.method, config, Source(options.moments))
    edits = load_edits(options.data, start=options.start, limit=options.limit)
    # Second moments are not part of a batch.
    _ = editor.state
    written: list[float] = []
    for name in ("commit", "snapshot_if_due"):
        setattr(Recorder, name, clocked(getattr(Recorder, name), written))
    started = time.perf_counter()
    run = editor.edit(edits, options.batch_size, run_dir=options.folder)
    seconds, after = time.perf_counter() - started, editor.weights.fingerprint()
    size, share = sum(path.stat().st_size for path in options.folder.iterdir()), sum(written) / seconds
    print(f"{seconds:.1f} s for {len(run.edits)} edits in {len(run.batches)} batches, identity of the model included")
    print(f"on the disk: {sum(written):.2f} s, {share:.2%} of it; {size / len(edits):.0f} bytes per edit")
    editor.weights.reset()
    started = time.perf_counter()
    recorder = Recorder.open(options.folder)
    recorder.check(model, editor.weights, {"method": options.method, "config": config, "seed": 0})
    checked = time.perf_counter()
    recorder.replay_weights(editor.weights)
    replayed = time.perf_counter()
    editor.state.load({})
    recorder.replay_state(editor.state)
    resumed = time.perf_counter() - started
    same = editor.weights.fingerprint() == after
    print(
        f"resume: {resumed:.2f} s, checks {checked - started:.2f}, weights {replayed - checked:.2f}; same bits: {same}"
    )
    if not same:
        raise SystemExit("the resumed weights are not those that were written")
    if options.record:
        row = {"benchmark": "journal", "backend": "torch", "dtype": "float32", "shape": f"{len(edits)} edits"}
        append_row(**row, metric="share of run time", median=round(share, 5), unit="")
        append_row(**row, metric="bytes per edit", median=round(size / len(edits)), unit="B")
        append_row(**row, metric="resume", median=round(resumed, 2), unit="s")


if __name__ == "__main__":
    main()
