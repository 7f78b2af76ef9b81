"""A batch that would harm the model is taken back bit for bit, and says why; trouble on the way is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit.methods.closed_form.recipe as base
from fastedit.editing.guard import Guard, GuardTripped
from fastedit.editor import Editor
from fastedit.model.load import load_model
from fastedit.records.edit import EditSet
from fastedit.runs.log import RunLog
from fastedit.runs.reports import BatchRejected

TEXT = (Path(__file__).resolve().parents[1] / "tiny" / "text.txt").read_text(encoding="utf-8")[:4000]
BATCH = 3
Make = Callable[..., Editor]


def bits(editor: Editor) -> dict[str, bytes]:
    return {name: each.numpy().tobytes() for name, each in editor.model.state_dict().items()}


def test_growth_past_its_bound_is_rolled_back(fast_editor: Make, stream: EditSet, tmp_path: Path) -> None:
    editor = fast_editor()
    editor.edit(stream[:3], run_dir=tmp_path / "run")
    before = bits(editor)
    tight = Guard(max_growth=1 + 1e-7)
    with pytest.raises(BatchRejected, match=r"layer \d has 1\S* times its norm \(max_growth 1\)"):
        editor.edit(stream[3:6], guard=tight)
    assert bits(editor) == before
    run = editor.edit(stream[3:9], BATCH, on_error="skip", guard=tight)
    assert all("its norm" in (report.error or "") for report in run.batches)
    assert bits(editor) == before
    assert [record.kind for record in RunLog(tmp_path / "run").records].count("rejected") == 3


def test_warning_instead_of_rolling_back(fast_editor: Make, stream: EditSet) -> None:
    editor, plain = fast_editor(), fast_editor()
    run = editor.edit(stream[:3], guard=Guard(max_growth=1 + 1e-7, only_warn=True))
    plain.edit(stream[:3])
    assert editor.weights.fingerprint() == plain.weights.fingerprint()
    assert any("its norm" in note for note in run.batches[0].notes)
    assert run.batches[0].measured["growth"] > 1


def test_canaries_and_perplexity(fast_editor: Make, stream: EditSet) -> None:
    editor = fast_editor()
    guard = Guard(canaries=stream[10:], min_unchanged=0.9, text=TEXT, max_perplexity=1.5)
    guard.begin(editor.adapter, editor.weights)
    measured = guard.check(editor.adapter, editor.weights, [2])
    assert measured == {"growth": 1.0, "unchanged": 1.0, "perplexity": 1.0}
    editor.weights.put(2, None, -editor.weights.original(2))
    with pytest.raises(GuardTripped, match=r"of the canaries' tokens stayed \(bound 0.9\).*perplexity is .* times"):
        guard.check(editor.adapter, editor.weights, [2])
    editor.weights.put(2, None, 1e30 * editor.weights.original(2))
    with pytest.raises(GuardTripped, match="layer 2 has inf times its norm"):
        guard.check(editor.adapter, editor.weights, [2])
    editor.weights.put(2, None, float("nan") * editor.weights.original(2))
    with pytest.raises(GuardTripped, match="layer 2 has nan times its norm"):
        guard.check(editor.adapter, editor.weights, [2])
    # Begun on an edited model, it still compares with the unedited one.
    guard.begin(editor.adapter, editor.weights)
    editor.weights.reset()
    assert guard.check(editor.adapter, editor.weights, [2]) == measured


def test_wrong_bounds_are_named(stream: EditSet) -> None:
    with pytest.raises(ValueError, match="max_growth > 1"):
        Guard(max_growth=1)
    with pytest.raises(ValueError, match=r"^guard: wanted max_growth > 1, got 0.5$"):
        Guard(max_growth=0.5)
    with pytest.raises(
        ValueError, match=r"^guard: wanted max_perplexity > 1, got nan; wanted min_unchanged in \[0, 1\]"
    ):
        Guard(max_perplexity=float("nan"), min_unchanged=2)
    with pytest.raises(ValueError, match="none of the 1 canaries has a locality prompt"):
        Guard(canaries=[stream[0].model_copy(update={"locality": ()})])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_broken_activations(number: float, fast_editor: Make, stream: EditSet) -> None:
    editor = fast_editor()
    assert editor.state.templates
    # Above the edited layers: keys are sound, the values that come back through it are not.
    dict(editor.model.named_parameters())[editor.adapter.weight_name(5)].data[0, 0] = number
    before = bits(editor)
    with pytest.raises(BatchRejected, match="not finite"):
        editor.edit(stream[:3])
    assert bits(editor) == before


@pytest.mark.parametrize("part", ["residual", "solution"])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_broken_deltas(
    part: str, number: float, fast_editor: Make, stream: EditSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = base.apply_update

    def broken(trial: Any, layer: int, index: Any, residual: Any, solution: Any, rows: Any) -> float:
        if layer == 4:
            (residual if part == "residual" else solution)[0, 0] = number
        return real(trial, layer, index, residual, solution, rows)

    monkeypatch.setattr(base, "apply_update", broken)
    editor = fast_editor()
    before = bits(editor)
    with pytest.raises(BatchRejected, match=f"layer 4: the update is not finite.*{stream[0].case_id}"):
        editor.edit(stream[:3])
    assert bits(editor) == before


class TestSecondMoments:
    """Singular ones: what can be solved is, and reported; what cannot is refused."""

    def editor(self, made: Editor, moment: torch.Tensor) -> Editor:
        moments = dict.fromkeys(made.config.layers, moment)
        return Editor(made.adapter, "nse", made.config, moments=moments, progress=False)

    def test_of_low_rank_needs_jitter_and_says_so(self, fast_editor: Make, stream: EditSet) -> None:
        made = fast_editor()
        # Small integers: their products are exact, so the rank is.
        keys = torch.randint(-3, 4, (7, made.adapter.d_ff), generator=torch.Generator().manual_seed(3)).float()
        run = self.editor(made, keys.T @ keys).edit(stream[:3])
        assert any("needed jitter" in note for note in run.batches[0].notes)

    @pytest.mark.parametrize("number", [0.0, float("nan")])
    def test_without_any_number_are_refused(self, number: float, fast_editor: Make, stream: EditSet) -> None:
        made = fast_editor()
        before = bits(made)
        with pytest.raises(BatchRejected, match="not positive definite"):
            self.editor(made, torch.full((made.adapter.d_ff, made.adapter.d_ff), number)).edit(stream[:3])
        assert bits(made) == before


def test_lack_of_memory_halves_the_budget_and_is_recorded(
    fast_editor: Make, stream: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, limit = base.optimise_values, [200]

    def short(model: Any, edits: Any, templates: Any, layer: int, config: Any, *rest: Any) -> Any:
        if config.token_budget > limit[0]:
            raise MemoryError
        return real(model, edits, templates, layer, config, *rest)

    monkeypatch.setattr(base, "optimise_values", short)
    editor = fast_editor()
    run = editor.edit(stream[:6], BATCH, run_dir=tmp_path / "run")
    assert [report.token_budget for report in run.batches] == [192, 192]
    assert any("token budget of 192" in note for note in run.batches[0].notes)
    assert run.batches[1].notes == ()
    # A later process goes on with the budget, and so with the groups, that the run has come to.
    limit[0] = 10**6
    later = fast_editor()
    assert later.edit(stream[6:9], run_dir=tmp_path / "run", resume=True).batches[0].token_budget == 192
    limit[0] = 1
    before = bits(later)
    with pytest.raises(MemoryError):
        later.edit(stream[9:12])
    assert bits(later) == before


def test_temporary_edits_leave_nothing(fast_editor: Make, stream: EditSet, tmp_path: Path) -> None:
    editor = fast_editor()
    editor.edit(stream[:6], BATCH, run_dir=tmp_path / "run")
    before, records = bits(editor), len(RunLog(tmp_path / "run").records)
    with editor.temporarily(stream[6:9]) as run:
        assert len(run.edits) == 3
        assert bits(editor) != before
        assert len(editor.edits) == 9
    assert bits(editor) == before
    assert [edit.case_id for edit in editor.edits] == [edit.case_id for edit in stream[:6]]
    assert len(RunLog(tmp_path / "run").records) == records
    plain = fast_editor()
    plain.edit(stream[:9], BATCH)
    editor.edit(stream[6:9])
    assert bits(editor) == bits(plain)
    editor.undo(last=3)
    assert bits(editor) == bits(fast_editor())
    with pytest.raises(BatchRejected), editor.temporarily(stream[:3], guard=Guard(max_growth=1 + 1e-7)):
        pytest.fail("the block of edits that were refused")
    assert bits(editor) == bits(fast_editor())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without one")
def test_cuda_on_a_machine_without_it() -> None:
    with pytest.raises(ValueError, match="'cuda:0' was asked for, and torch finds no CUDA device"):
        load_model(str(Path(__file__).resolve().parents[1] / "tiny" / "model"), device="cuda:0")
