"""The quick start of docs/meg.md on the real model: 64 of the shipped facts, a few minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastedit.methods.meg import MeG
from fastedit.records.shipped import shipped_facts

SOURCE = "smollm2-135m"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["meg-lookup", "meg"])
def test_sixty_four_edits_of_a_real_model(tmp_path: Path, method: str) -> None:
    edits = shipped_facts()
    meg = MeG.from_pretrained(SOURCE, method=method, progress=False)
    run = meg.edit(edits[:64], edits[64:], tmp_path)
    assert len(run.failed) <= 2
    before, after = meg.measure()
    assert before.locality == (100, 100)
    assert after.reliability is not None
    assert after.generality is not None
    assert after.locality is not None
    assert after.reliability[1] >= 90
    assert after.generality[0] >= 40
    assert after.locality[1] >= 60
    assert after.score is not None
    assert after.score >= 60
