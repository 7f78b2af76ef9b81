"""The facts that ship with fastedit: places, works and things, for the demo, and to measure and check a model with."""

from __future__ import annotations

from importlib import resources
from typing import Any

from fastedit.records.check import check_edits
from fastedit.records.edit import Edit, EditSet, InvalidEdits
from fastedit.records.load import load_edits


def shipped_facts(limit: int | None = None) -> EditSet:
    """The first `limit` of the facts, or all. Each has a true answer, another wording, and a neighbour."""
    with resources.as_file(resources.files("fastedit") / "data" / "demo.jsonl") as path:
        return load_edits(path, limit=limit)


def usable_facts(limit: int | None = None, **limits: Any) -> list[Edit]:
    """Those of the first `limit` facts that a model can take; empty where it takes none.

    limits: of the model, as `check_edits` takes them"""
    facts = shipped_facts(limit)
    try:
        batches, _ = check_edits(facts, len(facts), **limits, on_invalid="skip")
    except InvalidEdits:
        return []
    return [edit for batch in batches for edit in batch]
