"""The tables of the methods that write single neurons (FiNE, KNE, KN), beside NSE and MEMIT on the same records.

    python bench/columns.py --data counterfact-edit.json --out columns/ --only 'independent/*'
    python bench/columns.py --data counterfact-edit.json --out columns/ --show

Every row is stored in --out as JSON as soon as it is measured, and a stored row is not run again. --show prints the
tables of the stored rows. The protocols:

independent   every edit alone in the unedited model: located, trained, written, evaluated, undone
batch         all edits in one write, then all evaluated
sequential    batch after batch on the edited model, all evaluated after the last batch

Independent edits do not influence each other, so they are trained together. KNE's attributions are computed together
too, and stored in --out for all rows with the same attribution settings. Seconds are process time per edit, for
locating, training and writing only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from column_rows import ROWS, Row, table
from timing import commit, machine_line

from fastedit import Editor, EditSet, Source, load_edits
from fastedit.config import changed, parse_changes
from fastedit.evaluation.metrics import Measurement, Metric
from fastedit.methods.closed_form.recipe import Batch, ClosedFormMethod
from fastedit.methods.closed_form.values import Values
from fastedit.methods.columns.attribution import attribute
from fastedit.methods.columns.config import AttributionConfig
from fastedit.methods.columns.contributions import Slots
from fastedit.methods.columns.kne import choose_ensemble
from fastedit.methods.columns.recipe import ColumnBatch, write_columns
from fastedit.methods.columns.training import Trained, train_columns
from fastedit.methods.presets import preset_for
from fastedit.model.load import load_model
from fastedit.model.tokens import whole_sequences
from fastedit.weights.trial import Trial

CHUNK = 50


@dataclass(frozen=True)
class Given(Batch):
    """A batch of a closed-form method whose values are known."""

    known: Values | None = None

    def values(self) -> Values:
        return self.known or super().values()


class Bench:
    """Runs rows on one model; rows of the same records share the unedited model's measurement."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = load_model(options.model)
        self.text = None if options.text is None else options.text.read_text(encoding="utf-8")
        self._unedited: dict[tuple[int, int], Measurement] = {}

    def edits(self, row: Row) -> EditSet:
        return load_edits(self.options.data, start=row.start, limit=min(row.limit, self.options.limit or row.limit))

    def editor(self, row: Row) -> Editor:
        config = preset_for(row.method, self.model)
        config = changed(config, parse_changes(row.settings))
        return Editor(self.model, row.method, config, Source(self.options.moments), progress=False)

    def measure(self, edits: EditSet, text: str | None, fluency: int) -> Measurement:
        return Measurement.take(self.model, edits, text, 20_000, fluency, 0, False)

    def unedited(self, row: Row) -> Measurement:
        key = row.start, row.limit
        if key not in self._unedited:
            self._unedited[key] = self.measure(self.edits(row), self.text, self.options.fluency)
        return self._unedited[key]

    def run(self, row: Row) -> dict[str, Any]:
        """Metrics and costs of a row. The model is unedited again afterwards."""
        before = self.unedited(row)
        edits = self.edits(row)
        editor = self.editor(row)
        # Preparing the state is not part of the time.
        _ = editor.state

        cost = Cost(self.model.d_model, sum(p.numel() for p in self.model.model.parameters()))
        if row.protocol == "independent":
            metrics = self.independent(editor, edits, before, cost)
        else:
            started = time.process_time()
            run = editor.edit(edits, len(edits) if row.protocol == "batch" else row.batch_size)
            cost.seconds = time.process_time() - started
            cost.take(sum(sum(report.neurons.values()) for report in run.batches), 1)
            cost.steps = [report.steps for report in run.batches]
            metrics = plain(self.measure(edits, self.text, self.options.fluency).metrics(before))
            restore(editor)

        return {
            "row": dataclasses.asdict(row),
            "n_edits": len(edits),
            "config": editor.config.model_dump(mode="json"),
            "unedited": plain(before.metrics(before)),
            "edited": metrics,
            **cost.to_dict(len(edits)),
            "machine": machine_line(),
            "commit": commit(),
        }

    def independent(self, editor: Editor, edits: EditSet, before: Measurement, cost: Cost) -> dict[str, Any]:
        """Means of the metrics, with standard errors, over edits that were each alone in the model."""
        singles = []
        for number, _ in enumerate(self.alone(editor, edits, cost)):
            after = self.measure(edits[number : number + 1], None, int(number < self.options.fluency))
            singles.append(plain(after.metrics(before)))
        return {name: mean([single[name]["value"] for single in singles if name in single]) for name in singles[0]}

    def alone(self, editor: Editor, edits: EditSet, cost: Cost) -> Iterator[int]:
        """Yields the number of each edit while that edit alone is in the model."""
        write = self.closed if isinstance(editor.method, ClosedFormMethod) else self.columns
        for first in range(0, len(edits), CHUNK):
            yield from write(editor, edits[first : first + CHUNK], cost)

    def closed(self, editor: Editor, edits: EditSet, cost: Cost) -> Iterator[int]:
        """As `alone`, for a closed-form method: values together, then one write per edit."""
        recipe: Any = editor.method.recipe
        with Trial(editor.weights) as trial, torch.no_grad(), cost.clock():
            values = Batch(self.model, edits, editor.config, editor.state, trial).values()

        for number in range(len(edits)):
            own = Values.from_tensors({name: rows[number : number + 1] for name, rows in values.tensors().items()})
            with Trial(editor.weights) as trial, torch.no_grad():
                with cost.clock():
                    batch = Given(self.model, edits[number : number + 1], editor.config, editor.state, trial, known=own)
                    result = recipe(batch)
                cost.take(sum(result.neurons.values()), int(own.steps[0]))
                yield number

    def columns(self, editor: Editor, edits: EditSet, cost: Cost) -> Iterator[int]:
        """As `alone`, for a method that writes columns: trained together, then one write per edit."""
        with Trial(editor.weights) as trial, torch.no_grad(), cost.clock():
            if editor.method.name == "kne":
                slots, trained = self.ensembles(editor, edits)
            else:
                result: Any = editor.method.write_batch(editor.stream.start, editor.state, edits, trial)
                slots, trained = result.slots, result.trained

        for number, edit in enumerate(edits):
            here = slots.edits == number
            own = dataclasses.replace(slots.pick(here), edits=torch.zeros(int(here.sum()), dtype=torch.int64))
            part = Trained(
                trained.delta[here],
                trained.losses[number : number + 1],
                trained.worst[number : number + 1],
                trained.steps[number : number + 1],
                trained.curve[:, number : number + 1],
            )
            with Trial(editor.weights) as trial, torch.no_grad():
                with cost.clock():
                    written = write_columns(ColumnBatch(editor.stream.start, editor.state, [edit], trial), own, part)
                cost.take(sum(written.neurons.values()), int(trained.steps[number]))
                yield number

    def ensembles(self, editor: Editor, edits: EditSet) -> tuple[Slots, Trained]:
        """Every edit's own ensemble (KNE) and its vectors, trained alone."""
        config: Any = changed(editor.config, {"ensemble": "own"})
        sequences = whole_sequences(self.model.tokenizer, [e.prompt for e in edits], [e.target_new for e in edits])
        with self.model.packed():
            slots = choose_ensemble(self.attributions(edits, config.attribution), config)
            return slots, train_columns(self.model, sequences, slots, config.train)

    def attributions(self, edits: EditSet, config: AttributionConfig) -> torch.Tensor:
        """Attributions of the edits, (n_edits, n_layers, d_ff), from --out where they are stored."""
        named = [[edit.prompt, edit.target_new, edit.target_true] for edit in edits]
        key = hashlib.sha256(json.dumps([self.options.model, named, config.model_dump()]).encode()).hexdigest()[:16]
        path = self.options.out / f"attributions-{key}.pt"
        if not path.exists():
            torch.save(attribute(self.model, edits, config), path)
        return torch.load(path)


class Cost:
    """Process time, neurons written and Adam steps of a row."""

    def __init__(self, d_model: int, n_parameters: int) -> None:
        self.d_model = d_model
        self.n_parameters = n_parameters
        self.seconds = 0.0
        self.neurons: list[int] = []
        self.steps: list[Any] = []

    @contextlib.contextmanager
    def clock(self) -> Iterator[None]:
        """Adds the process time of the block."""
        started = time.process_time()
        try:
            yield
        finally:
            self.seconds += time.process_time() - started

    def take(self, neurons: int, steps: int) -> None:
        self.neurons.append(neurons)
        self.steps.append(steps)

    def to_dict(self, n_edits: int) -> dict[str, Any]:
        neurons = sum(self.neurons) / len(self.neurons)
        return {
            "process_seconds_per_edit": self.seconds / n_edits,
            "neurons": neurons,
            "share_of_parameters": neurons * self.d_model / self.n_parameters,
            "steps": sum(self.steps) / len(self.steps),
        }


def restore(editor: Editor) -> None:
    """Write the original weights into the model."""
    for layer in editor.weights.layers:
        editor.adapter.down_weight(layer).copy_(editor.weights.original(layer))


def plain(metrics: Mapping[str, Metric]) -> dict[str, dict[str, float | None]]:
    """Metrics as JSON."""
    return {name: {"value": metric.value, "error": metric.error} for name, metric in metrics.items()}


def mean(values: Sequence[float | None]) -> dict[str, float | None]:
    """The mean of the values that are not None, and its standard error."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return {"value": known[0] if known else None, "error": None}
    middle = sum(known) / len(known)
    variance = sum((value - middle) ** 2 for value in known) / (len(known) - 1)
    return {"value": middle, "error": math.sqrt(variance / len(known))}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="edit records, .jsonl or .json")
    parser.add_argument("--out", type=Path, required=True, help="folder of the stored rows")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--only", nargs="*", default=["*"], help="rows to run, as TABLE/NAME with wildcards")
    parser.add_argument("--show", action="store_true", help="print the tables of the stored rows, and run nothing")
    parser.add_argument("--limit", type=int, help="take fewer records, for a trial run")
    parser.add_argument("--moments", type=Path, help="text for second moments; default: sampled from the model")
    parser.add_argument("--text", type=Path, help="text for perplexity after batches and streams")
    parser.add_argument("--fluency", type=int, default=0, help="prompts continued to measure fluency")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [row for row in ROWS if any(fnmatch.fnmatch(row.key, pattern) for pattern in options.only)]
    paths = {row.key: options.out / f"{row.key.replace('/', '--').replace(' ', '_')}.json" for row in wanted}

    bench = None
    for row in [] if options.show else wanted:
        if paths[row.key].exists():
            continue
        bench = bench or Bench(options)
        started = time.perf_counter()
        paths[row.key].write_text(json.dumps(bench.run(row), indent=1), encoding="utf-8")
        print(f"{row.key}: {time.perf_counter() - started:.0f} s", flush=True)

    for name in dict.fromkeys(row.table for row in wanted):
        stored = [paths[row.key] for row in wanted if row.table == name and paths[row.key].exists()]
        if stored:
            print(f"\n{name}\n\n{table([json.loads(path.read_text(encoding='utf-8')) for path in stored])}")


if __name__ == "__main__":
    main()
