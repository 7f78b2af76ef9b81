"""Runs on disk end to end: resumed anywhere they end bit for bit as if nothing had happened."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastedit.editing.guard import GuardTripped
from fastedit.editor import Editor
from fastedit.methods.registry import METHODS
from fastedit.records.edit import Edit, EditSet
from fastedit.runs.head import HEAD, Head
from fastedit.runs.log import LOG, DamagedRun, LockedRun, RunError, RunLog, RunWriteError
from fastedit.runs.reports import BatchRejected, Run
from fastedit.runs.streams import describe_stream

Make = Callable[..., Editor]

BATCH = 3


def prints(editor: Editor) -> tuple[str, dict[str, bytes]]:
    """What must come out bit for bit: the weights, and the state."""
    state = {name: tensor.numpy().tobytes() for name, tensor in editor.state.tensors().items()}
    return editor.weights.fingerprint(), state


def stopped_after(folder: Path, n_batches: int, copy: Path) -> Path:
    """The run as a kill after so many batches leaves it."""
    shutil.copytree(folder, copy)
    lines = (copy / LOG).read_bytes().splitlines(keepends=True)
    keep = [i for i, record in enumerate(RunLog(folder).records) if record.kind == "batch"][n_batches:][0]
    (copy / LOG).write_bytes(b"".join(lines[:keep]))
    for path in copy.glob("*.safetensors"):
        if int(path.stem) >= keep:
            path.unlink()

    kept = RunLog(copy, up_to_damage=True)
    (copy / HEAD).write_bytes(Head(keep, kept.chain).payload)
    return copy


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    method: str, fast_editor: Make, stream: EditSet, tmp_path: Path
) -> None:
    plain = fast_editor(method)
    plain.edit(stream, BATCH)
    recorded = fast_editor(method)
    recorded.edit(stream, BATCH, run_dir=tmp_path / "run")
    assert prints(recorded) == prints(plain)
    cut = stopped_after(tmp_path / "run", 2, tmp_path / "cut")
    editor = fast_editor(method)
    run = editor.edit(stream, BATCH, run_dir=cut, resume=True)
    assert prints(editor) == prints(plain)
    assert [edit.case_id for edit in run.edits] == [edit.case_id for edit in stream]
    assert [report.batch for report in run.batches] == [0, 1, 2, 3, 4]
    again = fast_editor(method)
    assert len(again.edit(stream, BATCH, run_dir=cut, resume=True).edits) == len(stream)
    assert prints(again) == prints(plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_with_its_masters(
    dtype: torch.dtype, fast_editor: Make, stream: EditSet, tmp_path: Path, tiny_parts: tuple[Any, Any]
) -> None:
    import copy

    from fastedit.model.adapter import ModelAdapter

    def half() -> ModelAdapter:
        return ModelAdapter(copy.deepcopy(tiny_parts[0]).to(dtype), tiny_parts[1])

    made = fast_editor()
    first = Editor(half(), "nse", made.config, moments=made.state.moments, progress=False)
    first.edit(stream[:6], BATCH, run_dir=tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    second = Editor.resume(tmp_path / "copy", half(), moments=made.state.moments, progress=False)
    assert second.weights.fingerprint() == first.weights.fingerprint()
    for editor in (first, second):
        editor.edit(stream[6:9])
    assert prints(second) == prints(first)


def test_snapshots_and_the_dense_history_are_replayed(
    fast_editor: Make, tiny_facts: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastedit.runs.recorder.SNAPSHOT_SHARE", 1)
    editor = fast_editor(mass=0.9)
    # Past keys turn from rows into their sum within the third batch.
    editor.edit(tiny_facts[:200], 40, run_dir=tmp_path / "run")
    assert editor.state.past[2].dense is not None
    kinds = [record.kind for record in RunLog(tmp_path / "run").records]
    assert kinds.count("snapshot") >= 2
    assert kinds.index("snapshot") < len(kinds) - 2
    again = Editor.resume(tmp_path / "run", fast_editor().adapter, moments=editor.state.moments, progress=False)
    assert prints(again) == prints(editor)


def test_undo_beyond_memory_and_in_a_later_process(
    fast_editor: Make, stream: EditSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    editor = fast_editor()
    wanted = [prints(editor)]
    for start in range(0, 15, BATCH):
        editor.edit(stream[start : start + BATCH], run_dir=tmp_path / "run")
        wanted.append(prints(editor))
    later = Editor.resume(tmp_path / "run", fast_editor().adapter, moments=editor.state.moments, progress=False)
    assert prints(later) == wanted[5]
    later.undo()
    assert prints(later) == wanted[4]
    later.undo(to=1)
    assert prints(later) == wanted[1]
    assert [edit.case_id for edit in later.edits] == [edit.case_id for edit in stream[:3]]
    with pytest.raises(RunError, match="open it again"):
        editor.undo()
    last = Editor.resume(tmp_path / "run", fast_editor().adapter, moments=editor.state.moments, progress=False)
    last.edit(stream[3:6], run_dir=tmp_path / "run")
    assert prints(last) == wanted[2]
    last.undo(last=2)
    assert prints(last) == wanted[0]
    assert not caplog.records
    with pytest.raises(ValueError, match="0 batches are in memory or recorded"):
        last.undo()


def test_undo_in_memory_is_recorded(fast_editor: Make, stream: EditSet, tmp_path: Path) -> None:
    editor = fast_editor()
    editor.edit(stream, BATCH, run_dir=tmp_path / "run")
    editor.undo(last=2)
    again = Editor.resume(tmp_path / "run", fast_editor().adapter, moments=editor.state.moments, progress=False)
    assert prints(again) == prints(editor)
    # What was taken back stays so: the stream itself is at its end.
    assert len(again.edit(stream, BATCH, run_dir=tmp_path / "run", resume=True).edits) == 9


def test_stopping_and_skipping_batches(
    fast_editor: Make, stream: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastedit.methods.closed_form.recipe as base

    real = base.optimise_values

    def with_nan(model: Any, edits: EditSet, *rest: Any) -> Any:
        found = real(model, edits, *rest)
        for row, edit in enumerate(edits):
            if edit.case_id == stream[7].case_id:
                found.z[row, 7] = float("nan")
        return found

    with monkeypatch.context() as broken:
        broken.setattr(base, "optimise_values", with_nan)
        with pytest.raises(BatchRejected, match="not finite"):
            fast_editor().edit(stream, BATCH, run_dir=tmp_path / "run")
        shutil.copytree(tmp_path / "run", tmp_path / "skipping")
        editor = fast_editor()
        run = editor.edit(stream, BATCH, run_dir=tmp_path / "skipping", resume=True, on_error="skip")
        assert [report.error is None for report in run.batches] == [True, True, False, True, True]
        again = fast_editor()
        found = again.edit(stream, BATCH, run_dir=tmp_path / "skipping", resume=True)
        assert [report.error for report in found.batches] == [report.error for report in run.batches]
        assert found.batches[2].case_ids == (stream[7].case_id,)
        assert [edit.case_id for edit in found.edits] == [edit.case_id for edit in run.edits]
        assert prints(again) == prints(editor)
    mended, plain = fast_editor(), fast_editor()
    mended.edit(stream, BATCH, run_dir=tmp_path / "run", resume=True)
    plain.edit(stream, BATCH)
    assert prints(mended) == prints(plain)


class TestOtherEdits:
    """A run that is resumed with a longer, a shorter or another file of records."""

    def kinds(self, folder: Path) -> list[str]:
        return [record.kind for record in RunLog(folder).records if record.kind in ("stream", "batch")]

    def test_the_same_edits_are_nothing_to_do(
        self, finished: Path, fast_editor: Make, stream: EditSet, caplog: pytest.LogCaptureFixture
    ) -> None:
        before = (finished / LOG).read_bytes()
        # In batches of any size, since none is left to write.
        for size in (BATCH, 7):
            editor = fast_editor()
            run = editor.edit(stream, size, run_dir=finished, resume=True)
            assert "5 batches with 15 edits are written already; nothing to do" in caplog.text
            assert [report.batch for report in run.batches] == [0, 1, 2, 3, 4]
            assert len(run.edits) == len(editor.edits) == 15
        assert (finished / LOG).read_bytes() == before

    def test_a_longer_file_on_a_finished_run(
        self, fast_editor: Make, stream: EditSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        fast_editor().edit(stream[:7], BATCH, run_dir=tmp_path / "run")
        editor = fast_editor()
        run = editor.edit(stream, BATCH, run_dir=tmp_path / "run", resume=True)
        assert "3 batches with 7 edits are written already; going on with the 8 edits that follow" in caplog.text
        # The batches of the first call stay as they were cut, and the new ones end where they would have.
        assert [report.case_ids for report in run.batches] == [
            tuple(edit.case_id for edit in stream[start:end])
            for start, end in [(0, 3), (3, 6), (6, 7), (7, 9), (9, 12), (12, 15)]
        ]
        assert [report.batch for report in run.batches] == [0, 1, 2, 3, 4, 5]
        assert self.kinds(tmp_path / "run") == ["stream", *3 * ["batch"], "stream", *3 * ["batch"]]
        assert [edit.case_id for edit in editor.edits] == [edit.case_id for edit in stream]

        plain = fast_editor()
        for part in (stream[:7], stream[7:9], stream[9:]):
            plain.edit(part, BATCH)
        assert prints(editor) == prints(plain)

        # The longer file once more is nothing to do, and so is the first one.
        caplog.clear()
        again = fast_editor()
        assert len(again.edit(stream, BATCH, run_dir=tmp_path / "run", resume=True).edits) == 15
        assert len(again.edit(stream[:7], BATCH, run_dir=tmp_path / "run", resume=True).edits) == 7
        assert caplog.text.count("nothing to do") == 2
        assert prints(again) == prints(plain)

    def test_a_longer_file_on_an_unfinished_run(
        self, fast_editor: Make, stream: EditSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        fast_editor().edit(stream[:8], BATCH, run_dir=tmp_path / "run")
        cut = stopped_after(tmp_path / "run", 1, tmp_path / "cut")
        editor = fast_editor()
        run = editor.edit(stream, BATCH, run_dir=cut, resume=True)
        assert (
            "3 batches with 8 edits began; 2 batches are left and written first, then the 7 edits that follow, which"
            " are new" in caplog.text
        )
        assert [len(report.case_ids) for report in run.batches] == [3, 3, 2, 1, 3, 3]
        assert [record.body["batch"] for record in RunLog(cut).records if record.kind == "batch"] == [0, 1, 2, 0, 1, 2]

        # Killed in the second part, it goes on with the same longer file.
        half = stopped_after(cut, 4, tmp_path / "half")
        again = fast_editor()
        assert len(again.edit(stream, BATCH, run_dir=half, resume=True).edits) == 15
        assert prints(again) == prints(editor)
        assert again.forget(stream[9].case_id).batches == 2

    def test_a_batch_of_the_new_part_that_is_rejected(
        self, fast_editor: Make, stream: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fast_editor().edit(stream[:6], BATCH, run_dir=tmp_path / "run")
        with monkeypatch.context() as broken:
            broken.setattr("fastedit.editing.guard.Guard.check", raise_guard)
            with pytest.raises(BatchRejected, match="batch 2 rolled back"):
                fast_editor().edit(stream[:12], BATCH, run_dir=tmp_path / "run", resume=True)
        editor = fast_editor()
        run = editor.edit(stream[:12], BATCH, run_dir=tmp_path / "run", resume=True)
        assert [report.batch for report in run.batches] == [0, 1, 2, 3]
        assert len(editor.edits) == 12

    def test_other_edits_on_a_finished_run(self, fast_editor: Make, stream: EditSet, tmp_path: Path) -> None:
        fast_editor().edit(stream[:6], BATCH, run_dir=tmp_path / "run")
        log = (tmp_path / "run" / LOG).read_bytes()
        editor = fast_editor()

        changed = [stream[0], stream[1].model_copy(update={"target_new": "another"}), *stream[2:8]]
        named = r"5 of these 8 edits are in force \(case_id 0 first\), .* the new ones alone \(case_id 1 first\)"
        with pytest.raises(RunError, match=named):
            editor.edit(changed, BATCH, run_dir=tmp_path / "run", resume=True)
        with pytest.raises(RunError, match=r"2 of these 2 edits are in force .*, none is new, and nothing was written"):
            editor.edit(stream[1:3], BATCH, run_dir=tmp_path / "run", resume=True)
        assert (tmp_path / "run" / LOG).read_bytes() == log

        # Edits of which the run holds none, and those that were taken back, are written.
        editor.edit(stream[6:9], BATCH, run_dir=tmp_path / "run", resume=True)
        editor.undo(to=1)
        editor.edit(stream[4:6], BATCH, run_dir=tmp_path / "run", resume=True)
        assert [edit.case_id for edit in editor.edits] == [edit.case_id for edit in (*stream[:3], *stream[4:6])]

    def test_a_run_of_0_1_0_that_holds_no_hashes_of_its_edits(
        self, fast_editor: Make, stream: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as older:
            older.setattr("fastedit.runs.recorder.describe_stream", lambda batches: (describe_stream(batches)[0], {}))
            fast_editor().edit(stream[:8], BATCH, run_dir=tmp_path / "run")
        cut = stopped_after(tmp_path / "run", 1, tmp_path / "cut")

        editor = fast_editor()
        with pytest.raises(RunError, match=rf"before batch 1 of 3; edit 1 \(case_id {stream[1].case_id}\) is another"):
            editor.edit(stream[1:], BATCH, run_dir=cut, resume=True)
        with pytest.raises(RunError, match="before batch 1 of 3; these edits are others than then, from edit 4 on or"):
            editor.edit([*stream[:5], *stream[6:8]], BATCH, run_dir=cut, resume=True)
        with pytest.raises(RunError, match="batches of another size, 4; resume it with batches of 3"):
            editor.edit(stream[:8], 4, run_dir=cut, resume=True)
        run = editor.edit(stream, BATCH, run_dir=cut, resume=True)
        assert [len(report.case_ids) for report in run.batches] == [3, 3, 2, 1, 3, 3]


class TestTakenBack:
    """Records of a run that were taken back since, given again."""

    def resumed(self, make: Make, edits: Sequence[Edit], folder: Path, size: int = BATCH) -> tuple[Editor, Run]:
        editor = make()
        return editor, editor.edit(edits, size, run_dir=folder, resume=True)

    def written(self, folder: Path) -> int:
        """Number of batches in the log, in force or not."""
        return sum(record.kind == "batch" for record in RunLog(folder).records)

    def ids(self, edits: Iterable[Edit]) -> list[object]:
        return [edit.case_id for edit in edits]

    def test_all_of_them_are_written_again(
        self, fast_editor: Make, stream: EditSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        first, folder = fast_editor(), tmp_path / "run"
        first.edit(stream[:6], BATCH, run_dir=folder)
        written = prints(first)
        first.undo(last=2)

        again, run = self.resumed(fast_editor, stream[:6], folder)
        assert "these edits were taken back and none is in force; 6 edits are written, as a stream" in caplog.text
        assert self.ids(again.edits) == self.ids(run.edits) == self.ids(stream[:6])
        assert prints(again) == written
        assert prints(self.resumed(fast_editor, stream[:6], stopped_after(folder, 3, tmp_path / "cut"))[0]) == written

        # A third time nothing is left to do.
        log = (folder / LOG).read_bytes()
        caplog.clear()
        assert len(self.resumed(fast_editor, stream[:6], folder)[1].edits) == 6
        assert "2 batches with 6 edits are written already; nothing to do" in caplog.text
        assert "taken back" not in caplog.text
        assert (folder / LOG).read_bytes() == log

    def test_all_of_them_with_new_ones_behind(self, fast_editor: Make, stream: EditSet, tmp_path: Path) -> None:
        first, plain, folder = fast_editor(), fast_editor(), tmp_path / "run"
        first.edit(stream[:6], BATCH, run_dir=folder)
        first.undo(to=0)
        editor, _ = self.resumed(fast_editor, stream[:12], folder)
        plain.edit(stream[:12], BATCH)
        assert prints(editor) == prints(plain)

    def test_one_edit_stays_taken_back_until_it_is_given_alone(
        self, finished: Path, fast_editor: Make, stream: EditSet, caplog: pytest.LogCaptureFixture
    ) -> None:
        taken = stream[4]
        self.resumed(fast_editor, stream, finished)[0].forget(taken.case_id)
        before = self.written(finished)
        caplog.clear()

        _, run = self.resumed(fast_editor, stream, finished)
        assert (
            "5 batches with 14 edits are written already; nothing to do; 1 edit was taken back since and is not in"
            f" force (case_id {taken.case_id} first): give it alone, without the others, to write it again"
        ) in caplog.text
        assert self.ids(run.edits) == self.ids(edit for edit in stream if edit is not taken)
        assert self.written(finished) == before

        editor, _ = self.resumed(fast_editor, [taken], finished)
        assert self.ids(editor.edits)[-1] == taken.case_id
        caplog.clear()
        assert len(self.resumed(fast_editor, stream, finished)[1].edits) == 15
        assert "5 batches with 15 edits are written already; nothing to do" in caplog.text
        assert "taken back" not in caplog.text

    def test_some_batches_stay_so_while_new_edits_are_written(
        self, fast_editor: Make, stream: EditSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = tmp_path / "run"
        first = fast_editor()
        first.edit(stream[:9], BATCH, run_dir=folder)
        first.undo(last=2)
        named = rf"6 edits were taken back since and are not in force (case_id {stream[3].case_id} first): give them"

        editor, _ = self.resumed(fast_editor, stream[:12], folder)
        assert "1 batch with 3 edits is written already; going on with the 3 edits that follow" in caplog.text
        assert named in caplog.text
        assert self.ids(editor.edits) == self.ids([*stream[:3], *stream[9:12]])
        assert len(self.resumed(fast_editor, stream[3:9], folder)[0].edits) == 12

    def test_an_unfinished_stream_tells_them_too(
        self, finished: Path, fast_editor: Make, stream: EditSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cut = stopped_after(finished, 3, tmp_path / "cut")
        made = fast_editor()
        Editor.resume(cut, made.adapter, moments=made.state.moments, progress=False).undo()
        editor, _ = self.resumed(fast_editor, stream, cut)
        assert "5 batches with 15 edits began; 2 batches are left; 3 edits were taken back since" in caplog.text
        assert self.ids(editor.edits) == self.ids([*stream[:6], *stream[9:]])

    def test_a_shorter_file_while_they_are_written_again(
        self, fast_editor: Make, stream: EditSet, tmp_path: Path
    ) -> None:
        first, folder = fast_editor(), tmp_path / "run"
        first.edit(stream[:3], BATCH, run_dir=folder)
        first.undo()
        self.resumed(fast_editor, stream[:6], folder)
        cut = stopped_after(folder, 1, tmp_path / "cut")
        with pytest.raises(RunError, match="before batch 0 of 2; got only the first 3 of its 6 edits"):
            self.resumed(fast_editor, stream[:3], cut)

    def test_edits_in_force_behind_those_of_the_last_stream(
        self, fast_editor: Make, stream: EditSet, tmp_path: Path
    ) -> None:
        folder = tmp_path / "run"
        for part in (stream[:3], stream[3:6]):
            self.resumed(fast_editor, part, folder)
        log = (folder / LOG).read_bytes()
        named = rf"3 of the 4 edits behind those of the run are in force already \(case_id {stream[0].case_id} first\)"
        with pytest.raises(RunError, match=named):
            self.resumed(fast_editor, [*stream[3:6], *stream[:3], stream[6]], folder)
        assert (folder / LOG).read_bytes() == log

    def test_skipped_edits_are_told_as_such(
        self,
        fast_editor: Make,
        stream: EditSet,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        folder = tmp_path / "run"
        self.resumed(fast_editor, stream[:3], folder)
        with monkeypatch.context() as broken:
            broken.setattr("fastedit.editing.guard.Guard.check", raise_guard)
            fast_editor().edit(stream[:6], BATCH, "skip", run_dir=folder, resume=True)
        log = (folder / LOG).read_bytes()
        caplog.clear()
        self.resumed(fast_editor, stream[:6], folder)
        assert "1 batch with 3 edits is written already; nothing to do; 3 edits were skipped (case_id" in caplog.text
        assert "taken back" not in caplog.text
        assert (folder / LOG).read_bytes() == log


def raise_guard(*arguments: object) -> None:
    raise GuardTripped("refused by the test")


class TestRefused:
    """What does not belong to a run is refused before a weight is touched."""

    def test_without_saying_resume(self, finished: Path, fast_editor: Make, stream: EditSet) -> None:
        with pytest.raises(RunError, match="holds a run already; resume it"):
            fast_editor().edit(stream, BATCH, run_dir=finished)

    @pytest.mark.parametrize("place", ["edited", "other"])
    def test_another_model(self, place: str, finished: Path, fast_editor: Make, stream: EditSet) -> None:
        other = fast_editor().adapter
        parameter = other.down_parameter(3) if place == "edited" else other.head.weight
        parameter.data[0, 0] += 1e-3
        editor = Editor(other, "nse", fast_editor().config, moments=fast_editor().state.moments, progress=False)
        before = editor.weights.fingerprint()
        with pytest.raises(RunError, match="layers 3 differ" if place == "edited" else "not edited differ"):
            editor.edit(stream, BATCH, run_dir=finished, resume=True)
        assert editor.weights.fingerprint() == before

    def test_other_settings(self, finished: Path, fast_editor: Make, stream: EditSet) -> None:
        with pytest.raises(RunError, match=r"config\.rounds is 1, was 2"):
            fast_editor(rounds=1).edit(stream, BATCH, run_dir=finished, resume=True)
        with pytest.raises(RunError, match="method is 'memit', was 'nse'"):
            fast_editor("memit").edit(stream, BATCH, run_dir=finished, resume=True)

    def test_other_second_moments(self, finished: Path, fast_editor: Make, stream: EditSet) -> None:
        made = fast_editor()
        moments = {layer: 2 * moment for layer, moment in made.state.moments.items()}
        editor = Editor(made.adapter, "nse", made.config, moments=moments, progress=False)
        with pytest.raises(ValueError, match="second moments of layers 2, 3, 4"):
            editor.edit(stream, BATCH, run_dir=finished, resume=True)

    def test_other_edits_while_a_stream_is_unfinished(
        self, finished: Path, fast_editor: Make, stream: EditSet, tmp_path: Path
    ) -> None:
        cut = stopped_after(finished, 3, tmp_path / "cut")
        editor, log = fast_editor(), (cut / LOG).read_bytes()
        with pytest.raises(RunError, match="stopped before batch 3 of 5; got only the first 3 of its 15 edits"):
            editor.edit(stream[:3], BATCH, run_dir=cut, resume=True)
        with pytest.raises(RunError, match="batches of another size, 5; resume it with batches of 3"):
            editor.edit(stream, 5, run_dir=cut, resume=True)

        # The first is behind the run already, the second is not.
        for place in (4, 13):
            others = [*stream]
            others[place] = others[place].model_copy(update={"target_new": "another"})
            named = (
                rf"before batch 3 of 5; edit {place + 1} \(case_id {stream[place].case_id}\) is another one than then"
            )
            with pytest.raises(RunError, match=named):
                editor.edit(others, BATCH, run_dir=cut, resume=True)
        assert (cut / LOG).read_bytes() == log

    def test_edits_that_no_run_would_know(self, fast_editor: Make, stream: EditSet, tmp_path: Path) -> None:
        editor = fast_editor()
        editor.edit(stream[:3])
        with pytest.raises(RunError, match="1 batch was written before anything was recorded"):
            editor.edit(stream[3:6], run_dir=tmp_path / "run")
        assert not (tmp_path / "run").exists()
        with pytest.raises(ValueError, match="resume: wanted run_dir"):
            editor.edit(stream[3:6], resume=True)

    def test_a_run_that_is_being_written(self, finished: Path, fast_editor: Make, stream: EditSet) -> None:
        with RunLog(finished).writing(), pytest.raises(LockedRun):
            fast_editor().edit(stream, BATCH, run_dir=finished, resume=True)

    def test_damage(self, finished: Path, fast_editor: Make, stream: EditSet) -> None:
        path = finished / "000003.safetensors"
        good = path.read_bytes()
        path.write_bytes(good[:-100] + bytes([good[-100] ^ 1]) + good[-99:])
        editor = fast_editor()
        before = editor.weights.fingerprint()
        with pytest.raises(DamagedRun, match=r"000003\.safetensors"):
            editor.edit(stream, BATCH, run_dir=finished, resume=True)
        assert editor.weights.fingerprint() == before


def full_from_the_batch_on(editor: Editor, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, but on a disk that is full as soon as the stream's own record is written."""

    def write(*arguments: Any) -> Any:
        if editor.recorder.log.records[-1].kind == "stream":
            raise OSError(28, "No space left on device")
        return real(*arguments)

    return write


def test_failing_writes_stop_the_run_and_lose_nothing(
    fast_editor: Make, stream: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastedit.runs.log as runlog

    plain = fast_editor()
    plain.edit(stream, BATCH)
    for fault in ("_write_synced", "sync", "_write_all", "fsync"):
        editor, folder = fast_editor(), tmp_path / fault
        editor.edit(stream[:6], BATCH, run_dir=folder)
        before = prints(editor)

        place = runlog.os if fault == "fsync" else runlog
        writes = full_from_the_batch_on(editor, getattr(place, fault))
        with monkeypatch.context() as broken:
            broken.setattr(place, fault, writes)
            with pytest.raises(RunWriteError, match="No space left on device"):
                editor.edit(stream[6:9], run_dir=folder)
            assert prints(editor) == before
        assert not list(folder.glob("*.partial"))
        # The same editor goes on when there is space again, and so does a later one.
        editor.edit(stream[6:9], run_dir=folder)
        later = fast_editor()
        later.edit(stream[6:9], run_dir=folder, resume=True)
        assert prints(later) == prints(editor)
        later.edit(stream[9:], BATCH, run_dir=folder, resume=True)
        assert prints(later) == prints(plain)


def test_clock_that_goes_back_changes_nothing(
    fast_editor: Make, stream: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = iter(range(100, 0, -1))
    clock = SimpleNamespace(strftime=lambda form: f"2020-01-01T{next(hours)}:00:00")
    monkeypatch.setattr("fastedit.runs.log.time", clock)
    editor = fast_editor()
    editor.edit(stream, BATCH, run_dir=tmp_path / "run")
    again = fast_editor()
    again.edit(stream, BATCH, run_dir=tmp_path / "run", resume=True)
    assert prints(again) == prints(editor)


def test_another_number_of_threads_is_told(
    finished: Path, fast_editor: Make, stream: EditSet, caplog: pytest.LogCaptureFixture
) -> None:
    torch.set_num_threads(2)
    try:
        with caplog.at_level(logging.WARNING):
            fast_editor().edit(stream, BATCH, run_dir=finished, resume=True)
    finally:
        torch.set_num_threads(1)
    assert "threads 2 instead of 1" in caplog.text
