"""Watching a stream: the points, what they count, and the warnings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastedit.editing.watch import Watch
from fastedit.editor import Editor
from fastedit.records.edit import EditSet

TEXT = (Path(__file__).resolve().parents[1] / "tiny" / "text.txt").read_text(encoding="utf-8")


def test_points_follow_the_stream(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor()
    watch = Watch(editor, tiny_facts[:6], every=2, text=TEXT, text_tokens=500)
    run = editor.edit(tiny_facts[:15], batch_size=3, watch=watch)
    assert [point.n_edits for point in watch.points] == [0, 6, 12, 15]
    first, *later = watch.points
    assert first.metrics["tokens_unchanged"].value == 1
    assert first.metrics["efficacy_top1"].value < 0.2
    assert all(point.metrics["efficacy_top1"].value > 0.8 for point in later)
    assert first.drift == dict.fromkeys(editor.config.layers, 0.0)
    for layer in editor.config.layers:
        assert 0 < later[0].drift[layer] < later[-1].drift[layer]
        norms = [report.norms[layer] for report in run.batches]
        assert later[0].norms[layer] == pytest.approx(norms[0] + norms[1])
        assert later[-1].norms[layer] == pytest.approx(norms[4])
    moved = editor.weights.current(2) - editor.weights.original(2)
    assert later[-1].drift[2] == pytest.approx(float(moved.norm() / editor.weights.original(2).norm()))
    assert str(watch).splitlines()[-1].split()[0] == "15"
    assert watch.to_dict()[1]["n_edits"] == 6


def test_watching_changes_nothing(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    watched, alone = tiny_editor(), tiny_editor()
    watched.edit(tiny_facts[:6], batch_size=3, watch=Watch(watched, tiny_facts[:3]))
    alone.edit(tiny_facts[:6], batch_size=3)
    assert watched.weights.fingerprint() == alone.weights.fingerprint()


def test_growth_past_a_bound_warns(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet, caplog: pytest.LogCaptureFixture
) -> None:
    editor = tiny_editor()
    watch = Watch(editor, tiny_facts[:3], text=TEXT, text_tokens=500, max_perplexity=1.5, max_drift=1e-4)
    with torch.no_grad():
        # Real damage: another layer's head is turned around, which no drift of an edited layer shows.
        editor.model.lm_head.weight[:50] *= -1
        watch.begin()
        editor.model.lm_head.weight[:50] *= -3
    with caplog.at_level(logging.WARNING):
        editor.edit(tiny_facts[:3], watch=watch)
    assert any("perplexity" in warning and "bound 1.5" in warning for warning in watch.points[-1].warnings)
    assert any("layer 2 has moved" in warning for warning in watch.points[-1].warnings)
    assert "after 3 edits" in caplog.text
    assert watch.points[0].warnings == ()


def test_a_rejected_batch_is_not_counted(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor()
    layer = editor.config.layers[0]
    solver = editor.state.solvers[layer]
    solver.moment = torch.full_like(solver.moment, float("nan"))
    watch = Watch(editor, tiny_facts[:2])
    editor.edit(tiny_facts[:4], batch_size=2, on_error="skip", watch=watch)
    assert [point.n_edits for point in watch.points] == [0, 0, 0]
    assert max(watch.points[-1].drift.values()) == 0


@pytest.mark.parametrize(("every", "n"), [(0, 2), (1, 0)])
def test_nonsense_is_refused(every: int, n: int, tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    with pytest.raises(ValueError, match="every >= 1"):
        Watch(tiny_editor(), tiny_facts[:n], every=every)
