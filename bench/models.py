"""The methods on a model as it comes out of the box, and derived settings beside a swept preset, record by record.

    python bench/models.py smollm2-135m --data counterfact.jsonl --start 500 --limit 100 --methods nse,fine
    python bench/models.py smollm2-135m --data counterfact.jsonl --start 500 --limit 100 --methods nse --paired

Each method edits all records in batches of its own size, on the unedited model. Times are without second moments, and
without the check of derived settings, which has a column of its own. With `--paired` each method runs twice, with the
preset of the model and with derived settings; the differences are means over records with their standard errors.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timing import machine_line, peak_mb

from fastedit.editor import Editor
from fastedit.evaluation.answers import agreement, answer
from fastedit.methods.registry import METHODS
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.model.load import load_model
from fastedit.records.edit import Edit
from fastedit.records.load import load_edits

# What out of the box leaves open: MEMIT holds past keys only with memory.
CHANGES: dict[str, dict[str, Any]] = {"memit": {"memory": True}}
SHARES = ("efficacy", "efficacy_top1", "generalization", "specificity", "tokens_unchanged")
HEADER = ["method", "settings", *SHARES, "perplexity", "s per edit", "check, s", "peak, GB"]


@dataclass(frozen=True)
class Outcome:
    """One method on one model.

    cells: its row of the table
    per_record: by name, one number per record: whether the target ranks first, also after other words, and the share
        of a neighbour's answer that stayed
    """

    cells: list[str]
    per_record: dict[str, list[float]]


@dataclass(frozen=True)
class Bench:
    """What every method is measured on. text: whose perplexity is measured"""

    model: ModelAdapter
    edits: Sequence[Edit]
    text: str
    text_tokens: int
    moments: Source

    def run(self, name: str, is_derived: bool) -> Outcome:
        """Edit, measure, and bring the weights back. is_derived: although the model has a preset"""
        method = METHODS[name]
        if is_derived:
            method = replace(method, name=f"{name}-derived", presets=None)
        editor = Editor(self.model, method, CHANGES.get(name), self.moments, calibrate=False, progress=False)
        _ = editor.state

        check = editor.calibrate(again=True) if editor.settings.origin == "derived" and method.is_checked else None
        asked = self._ask()
        started = time.perf_counter()
        with editor.temporarily(self.edits, verify=False):
            seconds = time.perf_counter() - started
            measured = editor.evaluate(self.edits, self.text, text_tokens=self.text_tokens, fluency_prompts=0).to_dict()
            per_record = self._compare(asked, self._ask())

        edited, unedited = measured["edited"], measured["unedited"]
        cells = [name, editor.settings.origin]
        cells += [f"{edited[share]['value']:.3f} ± {edited[share]['error']:.3f}" for share in SHARES]
        cells.append(f"{edited['perplexity']['value'] / unedited['perplexity']['value']:.4f}")
        cells += [f"{seconds / len(self.edits):.2f}", "" if check is None else f"{check.seconds:.0f}"]
        return Outcome([*cells, f"{peak_mb() / 1000:.1f}"], per_record)

    def _ask(self) -> dict[str, list[Any]]:
        """Answers after the prompts, after other words, and to the first neighbours' questions."""
        edits = self.edits
        return {
            "took": answer(self.model, [(e.prompt, e.target_new, e.join) for e in edits]),
            "reworded": answer(self.model, [(e.rephrase_prompts[0], e.target_new, e.join) for e in edits]),
            "neighbour": answer(self.model, [(e.locality[0].prompt, e.locality[0].answers[0]) for e in edits]),
        }

    @staticmethod
    def _compare(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> dict[str, list[float]]:
        same = [agreement(a.best, b.best) for a, b in zip(before["neighbour"], after["neighbour"], strict=True)]
        return {
            "took": [float(one.exact) for one in after["took"]],
            "reworded": [float(one.exact) for one in after["reworded"]],
            "neighbour": same,
        }


def difference(preset: Sequence[float], derived: Sequence[float]) -> str:
    """Mean of derived minus preset over records, with its standard error."""
    pairs = torch.tensor(derived, dtype=torch.float64) - torch.tensor(preset, dtype=torch.float64)
    return f"{float(pairs.mean()):+.3f} ± {float(pairs.std()) / math.sqrt(len(pairs)):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--start", type=int, default=500)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--text", type=Path, required=True, help="its perplexity is measured")
    parser.add_argument("--text-tokens", type=int, default=20_000)
    parser.add_argument("--moments", type=Path, help="text for second moments; default: the model's own")
    parser.add_argument("--neighbours", type=int, help="locality questions asked of each record; default: all")
    parser.add_argument("--methods", default="nse,memit,alphaedit,fine,kne")
    parser.add_argument("--paired", action="store_true", help="the preset, and derived settings beside it")
    given = parser.parse_args()

    print(machine_line())
    model = load_model(given.model)
    records = load_edits(given.data, start=given.start, limit=given.limit)
    edits = [edit.model_copy(update={"locality": edit.locality[: given.neighbours]}) for edit in records]
    text = given.text.read_text(encoding="utf-8")
    bench = Bench(model, edits, text, given.text_tokens, Source(given.moments))

    print("| " + " | ".join(HEADER) + " |", "| --- " * len(HEADER) + "|", sep="\n", flush=True)
    for name in given.methods.split(","):
        outcomes = [bench.run(name, is_derived) for is_derived in ([False, True] if given.paired else [False])]
        for outcome in outcomes:
            print("| " + " | ".join(outcome.cells) + " |", flush=True)

        if given.paired:
            first, second = (outcome.per_record for outcome in outcomes)
            print("derived - preset:", {key: difference(first[key], second[key]) for key in first}, flush=True)


if __name__ == "__main__":
    main()
