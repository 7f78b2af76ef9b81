"""The demo: shipped facts written into a real model, with answers before and after."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fastedit.editor import Editor
from fastedit.model.families import FAMILIES, Family
from fastedit.model.sampling import sample_background
from fastedit.records.edit import Edit
from fastedit.records.shipped import shipped_facts
from fastedit.runtime.progress import Lines

SHOWN = 6
MOMENT_TOKENS = 16_000


def run_demo(
    source: str,
    n_edits: int,
    seed: int,
    console: Console,
    device: str = "cpu",
    lines: Lines | None = None,
    families: Sequence[Family] = FAMILIES,
) -> tuple[dict[str, Any], str]:
    """Edit `source` with the shipped facts; returns the data and the closing text. Steps go to `console`.

    lines: what tells of progress in place of bars; families: the rows to choose the model's family from"""
    started = time.perf_counter()
    edits = shipped_facts(n_edits)

    console.print(f"loading {source} ...")
    config = {"moments": {"tokens": MOMENT_TOKENS}}
    editor = Editor.from_pretrained(source, config=config, seed=seed, device=device, progress=lines, families=families)

    console.print(
        f"preparing: {MOMENT_TOKENS:,} tokens of the model's own text give the second moments (once, then stored) ..."
    )
    _ = editor.state

    prompts = _shown_prompts(edits)
    before = editor.ask(prompts)
    console.print(f"editing {len(edits)} facts with NSE ...")
    run = editor.edit(edits, batch_size=min(50, len(edits)))
    after = editor.ask(prompts)

    console.print("measuring ...")
    text = str(editor.tokenizer.decode(_own_text(editor, seed)))
    evaluation = editor.evaluate(run.edits, text, fluency_prompts=10, show=lines)

    seconds = time.perf_counter() - started
    data = {
        "run": run.to_dict(),
        "answers": [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)],
        "evaluation": evaluation.to_dict(),
        "seconds": seconds,
    }
    parts = (
        _answers_table(edits, prompts, before, after, console.width),
        f"{evaluation}\nperplexity is of text the unedited model wrote itself",
        f"{len(run.edits)} facts edited in {run.seconds:.1f} s: {run.seconds_per_edit:.2f} s per edit"
        f" (everything: {seconds:.0f} s)",
    )
    return data, "\n".join(parts)


def _own_text(editor: Editor, seed: int) -> list[int]:
    """2 000 tokens that the unedited model writes with another seed than the text of the second moments."""
    with editor.unedited():
        return [token for window in sample_background(editor.adapter, 2000, 256, seed + 1) for token in window]


def _shown_prompts(edits: Sequence[Edit]) -> list[str]:
    shown = edits[:SHOWN]
    return [edit.prompt for edit in shown] + [edit.locality[0].prompt for edit in shown if edit.locality]


def _answers_table(edits: Sequence[Edit], prompts: list[str], before: list[str], after: list[str], width: int) -> str:
    table = Table(title="the model's own words")
    for column in ("prompt", "edited to", "before", "after"):
        table.add_column(column)

    targets = [edit.target_new for edit in edits[:SHOWN]] + ["(must not move)"] * len(prompts)
    for prompt, target, old, new in zip(prompts, targets, before, after, strict=False):
        table.add_row(prompt, target, _short(old), _short(new))

    page = Console(file=io.StringIO(), width=width)
    with page.capture() as captured:
        page.print(table)
    return captured.get()


def _short(answer: str) -> str:
    return answer.strip().splitlines()[0] if answer.strip() else ""
