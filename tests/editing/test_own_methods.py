"""Methods of one's own that fail at any step of a batch: weights, state and run are as before, and the run goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastedit import BatchRejected, Edit, Editor, Method, RejectedUpdate
from fastedit.config import EditConfig
from fastedit.methods.base import Start
from fastedit.records.edit import EditSet
from fastedit.runs.log import RunLog
from fastedit.weights.apply import apply_update
from fastedit.weights.trial import Trial

LAYER = 2
Make = Callable[..., Editor]


class OwnConfig(EditConfig):
    size: float = 0.01


@dataclass
class OwnResult:
    rows: int
    stored: dict[str, Tensor] = field(default_factory=dict)
    neurons: dict[int, int] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)

    losses = torch.zeros(1)
    steps = torch.ones(1, dtype=torch.int64)

    @property
    def written(self) -> list[int]:
        return [self.rows]

    @property
    def is_written(self) -> Tensor:
        return torch.ones(self.rows, dtype=torch.bool)

    def tensors(self) -> dict[str, Tensor]:
        return self.stored


class OwnState:
    """Counts edits, in place, and fails once where it is told to."""

    def __init__(self) -> None:
        self.count = torch.zeros(2)
        self.fails = ""
        self.extra: dict[str, Any] = {}

    def fail(self, step: str) -> None:
        if self.fails == step:
            self.fails = ""
            raise RuntimeError(f"{step} failed")

    def kept(self, result: OwnResult) -> dict[str, Tensor]:
        self.fail("kept")
        return {"count": torch.full((2,), float(result.rows)), **self.extra}

    def take_in(self, kept: Mapping[str, Tensor]) -> None:
        self.count[0] += kept["count"][0]
        self.fail("take_in")
        self.count[1] += kept["count"][1]

    def tensors(self) -> dict[str, Tensor]:
        self.fail("tensors")
        return {"count": self.count}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.count = tensors.get("count", torch.zeros(2))

    def describe(self) -> dict[str, Any]:
        return {}

    def adopt(self, described: Mapping[str, Any]) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Own(Method[OwnConfig, OwnState]):
    """Adds a rank-one update per edit, then does what `after` does."""

    after: Callable[[int], OwnResult] = OwnResult

    def layers(self, model: Any, config: OwnConfig) -> tuple[int, ...]:
        return (LAYER,)

    def prepare(self, start: Start[OwnConfig]) -> OwnState:
        return OwnState()

    def write_batch(
        self,
        start: Start[OwnConfig],
        state: OwnState,
        edits: Sequence[Edit],
        trial: Trial,
        progress: Any = None,
        known: Any = None,
    ) -> OwnResult:
        generator = torch.Generator().manual_seed(sum(map(ord, edits[0].prompt)))
        residual = start.config.size * torch.randn(len(edits), start.model.d_model, generator=generator)
        solution = torch.randn(start.model.d_ff, len(edits), generator=generator)
        apply_update(trial, LAYER, None, residual, solution, torch.arange(len(edits)))
        return self.after(len(edits))


def raising(error: BaseException) -> Callable[[int], OwnResult]:
    def after(rows: int) -> OwnResult:
        raise error

    return after


@pytest.fixture
def own(tiny_editor: Make) -> Callable[..., Editor]:
    """Editors with a method of one's own, on fresh copies of the tiny model."""

    def make(after: Callable[[int], OwnResult] = OwnResult, undo_depth: int = 3) -> Editor:
        method = Own(name="own", config_class=OwnConfig, after=after)
        return Editor(tiny_editor().adapter, method, OwnConfig(), undo_depth=undo_depth, progress=False)

    return make


def with_method(editor: Editor, after: Callable[[int], OwnResult]) -> None:
    editor.stream.method = Own(name="own", config_class=OwnConfig, after=after)


def prints(editor: Editor) -> tuple[str, list[float], int]:
    return editor.weights.fingerprint(), editor.state.count.tolist(), len(editor.edits)


def check_as_before(editor: Editor, before: object, folder: Path | None, edits: EditSet, make: Make) -> None:
    """Nothing has changed, and editor and run go on as if nothing had been tried."""
    assert prints(editor) == before
    with_method(editor, OwnResult)
    editor.state.fails, editor.state.extra = "", {}

    plain = make()
    plain.edit(edits[:6], 3)
    if folder is not None:
        copy = Path(shutil.copytree(folder, folder.parent / "copy"))
        resumed = make()
        resumed.edit(edits[3:6], 3, run_dir=copy, resume=True)
        assert prints(resumed) == prints(plain)

    editor.edit(edits[3:6], 3, verify=False)
    assert prints(editor) == prints(plain)
    editor.undo()
    assert prints(editor) == before


ERRORS = [ValueError("mine"), RuntimeError("mine"), ZeroDivisionError("mine"), KeyboardInterrupt(), MemoryError("mine")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("recorded", [False, True], ids=["in memory", "recorded"])
def test_any_exception_of_a_method_rolls_back_and_is_not_counted_as_a_rejected_batch(
    error: BaseException, on_error: Any, recorded: bool, own: Make, tiny_facts: EditSet, tmp_path: Path
) -> None:
    folder = tmp_path / "run" if recorded else None
    editor = own()
    editor.edit(tiny_facts[:3], run_dir=folder)
    before = prints(editor)

    with_method(editor, raising(error))
    with pytest.raises(type(error)) as raised:
        editor.edit(tiny_facts[3:6], 3, on_error=on_error)
    assert raised.value is error
    assert folder is None or "rejected" not in [record.kind for record in RunLog(folder).records]
    check_as_before(editor, before, folder, tiny_facts, own)


# A state that is stored already is not asked for its `tensors` again.
FAULTS = [
    (step, n_before, undo_depth)
    for step in ("kept", "tensors", "take_in")
    for n_before in (0, 1, 5)
    for undo_depth in (1, 3)
    if (step, n_before, undo_depth) != ("tensors", 1, 3)
]


@pytest.mark.parametrize(("step", "n_before", "undo_depth"), FAULTS)
@pytest.mark.parametrize("recorded", [False, True], ids=["in memory", "recorded"])
def test_a_state_that_fails_leaves_everything_as_before(
    step: str, n_before: int, undo_depth: int, recorded: bool, own: Make, tiny_facts: EditSet, tmp_path: Path
) -> None:
    editor = own(undo_depth=undo_depth)
    folder = tmp_path / "run" if recorded else None
    if n_before:
        editor.edit(tiny_facts[:n_before], 1, run_dir=folder)
    before = prints(editor)

    editor.state.fails = step
    with pytest.raises(RuntimeError, match=f"{step} failed"):
        editor.edit(tiny_facts[10:13], run_dir=folder)
    assert prints(editor) == before
    if folder is not None:
        again = Editor.resume(folder, own().adapter, method=editor.method, progress=False)
        assert prints(again) == before

    editor.edit(tiny_facts[10:13], run_dir=folder)
    plain = own()
    if n_before:
        plain.edit(tiny_facts[:n_before], 1)
    plain.edit(tiny_facts[10:13])
    assert prints(editor) == prints(plain)


def test_a_method_rejects_a_batch_with_the_public_exception(own: Make, tiny_facts: EditSet, tmp_path: Path) -> None:
    editor = own()
    editor.edit(tiny_facts[:3], run_dir=tmp_path / "run")
    before = prints(editor)

    with_method(editor, raising(RejectedUpdate(LAYER, [1], "not for me")))
    run = editor.edit(tiny_facts[3:6], on_error="skip")
    assert [report.error for report in run.batches] == ["layer 2: not for me"]
    assert run.batches[0].case_ids == (tiny_facts[4].case_id,)
    assert RunLog(tmp_path / "run").records[-2].kind == "rejected"
    with pytest.raises(BatchRejected, match="not for me"):
        editor.edit(tiny_facts[3:6])
    assert prints(editor) == before

    # Rows that the batch does not have blame all of it.
    with_method(editor, raising(RejectedUpdate(LAYER, [7], "not for me")))
    with pytest.raises(BatchRejected) as stopped:
        editor.edit(tiny_facts[3:6])
    assert stopped.value.case_ids == [edit.case_id for edit in tiny_facts[3:6]]


@pytest.mark.parametrize("rows", [0, 2, 4])
def test_tensors_with_another_number_of_rows_are_named_when_the_batch_is_written(
    rows: int, own: Make, tiny_facts: EditSet, tmp_path: Path
) -> None:
    editor = own()
    editor.edit(tiny_facts[:3], run_dir=tmp_path / "run")
    before = prints(editor)

    with_method(editor, lambda n: OwnResult(n, {"mine": torch.zeros(rows, 5)}))
    named = rf"^own: tensors\(\)\['mine'\] of its result has shape \({rows}, 5\), wanted .* 3 edits"
    with pytest.raises(ValueError, match=named):
        editor.edit(tiny_facts[3:6])
    with_method(editor, lambda n: OwnResult(n - 1))
    with pytest.raises(ValueError, match=r"^own: is_written of its result has shape \(2,\), wanted"):
        editor.edit(tiny_facts[3:6])
    check_as_before(editor, before, tmp_path / "run", tiny_facts, own)


class TestStored:
    """What a method of one's own may give to be recorded."""

    def test_tensors_that_share_memory(self, own: Make, tiny_facts: EditSet, tmp_path: Path) -> None:
        whole = torch.arange(12.0).view(3, 4)
        shared = {"whole": whole, "again": whole, "part": whole[:, :2], "turned": whole.T[:3], "last": whole[2:]}
        shared["gradient"] = torch.ones(3, requires_grad=True)
        rows = {name: tensor for name, tensor in shared.items() if len(tensor) == 3}

        editor = own(lambda n: OwnResult(n, rows))
        editor.state.extra = shared
        editor.edit(tiny_facts[:3], run_dir=tmp_path / "run")
        log = RunLog(tmp_path / "run")
        log.verify()
        (batch,) = [record.number for record in log.records if record.kind == "batch"]
        stored = log.tensors(batch)
        assert all(torch.equal(stored[f"kept/{name}"], tensor) for name, tensor in shared.items())
        assert all(torch.equal(stored[f"values/{name}"], tensor) for name, tensor in rows.items())
        editor.state.extra = {}
        with_method(editor, OwnResult)
        assert editor.forget(tiny_facts[1].case_id).batches == 1

    def test_a_snapshot_of_tensors_that_share_memory(
        self, own: Make, tiny_facts: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("fastedit.runs.recorder.SNAPSHOT_SHARE", 0)
        monkeypatch.setattr(OwnState, "tensors", lambda self: {"count": self.count, "same": self.count})
        own().edit(tiny_facts[:3], run_dir=tmp_path / "run")
        assert "snapshot" in [record.kind for record in RunLog(tmp_path / "run").records]

    @pytest.mark.parametrize(
        ("wrong", "said"), [([1.0], "got list"), (torch.eye(3).to_sparse(), "got a tensor of layout torch.sparse_coo")]
    )
    def test_what_is_no_dense_tensor_is_named(
        self, wrong: Any, said: str, own: Make, tiny_facts: EditSet, tmp_path: Path
    ) -> None:
        editor = own()
        editor.edit(tiny_facts[:3], run_dir=tmp_path / "run")
        before = prints(editor)
        editor.state.extra = {"mine": wrong}
        with pytest.raises(TypeError, match=f"kept/mine: a record holds dense tensors only, {said}"):
            editor.edit(tiny_facts[3:6])
        check_as_before(editor, before, tmp_path / "run", tiny_facts, own)
