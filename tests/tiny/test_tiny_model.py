"""The tiny model that other tests edit: it loads as anybody's model would, is small, and knows its facts."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastedit.evaluation.metrics import answer
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import EditSet

TINY = Path(__file__).resolve().parents[1] / "tiny"


def exact(model: ModelAdapter, pairs: list[tuple[str, str]]) -> float:
    """Share of pairs whose target is the arg-max at every token."""
    return sum(found.exact for found in answer(model, pairs)) / len(pairs)


def test_it_knows_its_facts(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    assert len(tiny_facts) >= 250
    known = {
        "prompt": exact(tiny_model, [(e.prompt, e.target_true or "") for e in tiny_facts]),
        "rephrased": exact(tiny_model, [(p, e.target_true or "") for e in tiny_facts for p in e.rephrase_prompts]),
        "neighbour": exact(tiny_model, [(p.prompt, p.answer or "") for e in tiny_facts for p in e.locality]),
    }
    assert known["prompt"] >= 0.95
    assert known["rephrased"] >= 0.85
    assert known["neighbour"] >= 0.95
    assert exact(tiny_model, [(e.prompt, e.target_new) for e in tiny_facts]) <= 0.02


def test_it_is_small_enough_for_git() -> None:
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 2_500_000


@pytest.mark.parametrize("field", ["multi-token target", "subject first", "subject inside"])
def test_records_cover_what_editing_has_to_handle(tiny_model: ModelAdapter, tiny_facts: EditSet, field: str) -> None:
    tokenizer = tiny_model.tokenizer
    cases = {
        "multi-token target": sum(len(tokenizer.tokenize(" " + e.target_new)) > 1 for e in tiny_facts),
        "subject first": sum(e.subject_span[0] == 0 for e in tiny_facts),
        "subject inside": sum(e.subject_span[0] > 0 for e in tiny_facts),
    }
    assert cases[field] >= 20
