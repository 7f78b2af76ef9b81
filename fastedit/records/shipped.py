"""The facts that ship with fastedit: places, works and things, for the demo, and to measure and check a model with."""

from __future__ import annotations

from importlib import resources

from fastedit.records.edit import EditSet
from fastedit.records.load import load_edits


def shipped_facts(limit: int | None = None) -> EditSet:
    """The first `limit` of the facts, or all. Each has a true answer, another wording, and a neighbour."""
    with resources.as_file(resources.files("fastedit") / "data" / "demo.jsonl") as path:
        return load_edits(path, limit=limit)
