"""SIGKILL at random instants of a run: what is left resumes to the bits of an uninterrupted run.

The run is a forked child of this process, which saves its imports. It is killed after a random share of the time that a
whole run takes, and one in three is killed again while it resumes.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastedit.editor import Editor
from fastedit.evaluation.metrics import evaluate
from fastedit.records.edit import EditSet
from fastedit.runs.head import HEAD, Head
from fastedit.runs.log import LOG, RunLog, is_run

BATCH = 3
Make = Callable[..., Editor]


def in_a_child(make: Make, stream: EditSet, folder: Path, seconds: float | None) -> float:
    """Run, or continue the run, in a forked child, and kill it after so many seconds (None = never).

    Returns the time that it ran."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            make().edit(stream, BATCH, run_dir=folder, resume=True)
            code = 0
        finally:
            os._exit(code)

    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)

    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return time.monotonic() - started


def prints(editor: Editor) -> tuple[str, dict[str, bytes]]:
    """What must come out bit for bit: the weights, and the state."""
    state = {name: tensor.numpy().tobytes() for name, tensor in editor.state.tensors().items()}
    return editor.weights.fingerprint(), state


def metrics(editor: Editor, edits: EditSet) -> dict[str, float | None]:
    return {name: metric.value for name, metric in evaluate(editor, edits, fluency_prompts=0).edited.items()}


def on_disk(folder: Path) -> int:
    """How many batches a killed run has committed, with or without their lines."""
    if not is_run(folder):
        return 0

    log = RunLog(folder)
    with log.writing():
        return sum(record.kind == "batch" for record in log.records)


def kill_many(make: Make, stream: EditSet, folder: Path, times: int, seed: int) -> list[int]:
    """Kill runs, resume them to their end, and compare. Returns the number of batches that each had committed at its
    first kill."""
    whole = in_a_child(make, stream, folder / "whole", None)
    chance, plain, reached = random.Random(seed), make(), []
    wanted = metrics(plain, plain.edit(stream, BATCH).edits)

    for number in range(times):
        place = folder / str(number)
        in_a_child(make, stream, place, chance.uniform(0, whole))
        reached.append(on_disk(place))
        if chance.random() < 1 / 3:
            in_a_child(make, stream, place, chance.uniform(0, whole))
            assert on_disk(place) >= reached[-1]

        editor = make()
        run = editor.edit(stream, BATCH, run_dir=place, resume=True)
        assert [edit.case_id for edit in run.edits] == [edit.case_id for edit in stream]
        assert prints(editor) == prints(plain)
        assert metrics(editor, run.edits) == wanted
        shutil.rmtree(place)
    return reached


def test_a_handful_of_kills(fast_editor: Make, stream: EditSet, tmp_path: Path) -> None:
    kill_many(fast_editor, stream, tmp_path, 4, seed=1)


@pytest.mark.slow
def test_a_hundred_kills(fast_editor: Make, stream: EditSet, tmp_path: Path) -> None:
    reached = kill_many(fast_editor, stream, tmp_path, 100, seed=2)
    # Spread over the run: before the first batch, after each one.
    assert set(reached) >= {0, 1, 2, 3, 4}


@pytest.mark.parametrize("step", ["Path.replace", "RunLog._append_line"])
def test_killed_between_the_steps_of_the_first_record(
    step: str, fast_editor: Make, stream: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The narrowest gaps, hit on purpose: before the file has its name, and before its line is written."""
    monkeypatch.setattr(f"fastedit.runs.log.{step}", lambda self, other: os.kill(os.getpid(), signal.SIGKILL))
    in_a_child(fast_editor, stream, tmp_path / "run", None)
    monkeypatch.undo()
    assert is_run(tmp_path / "run") == (step == "RunLog._append_line")
    assert not (tmp_path / "run" / LOG).exists()

    editor, plain = fast_editor(), fast_editor()
    editor.edit(stream, BATCH, run_dir=tmp_path / "run", resume=True)
    plain.edit(stream, BATCH)
    assert editor.weights.fingerprint() == plain.weights.fingerprint()


STEPS = ("_write_synced", "Path.replace", "sync", "RunLog._append_line", "RunLog._write_head")


def appended(folder: Path, kill_at: int | None) -> int:
    """Append five records in a forked child, which is killed before its step number `kill_at`, counted from 0.

    Returns the number of records whose `append` had returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        import fastedit.runs.log as module

        steps = itertools.count()

        def killing(step: Callable[..., object]) -> Callable[..., object]:
            def run(*arguments: object) -> object:
                if next(steps) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*arguments)

            return run

        for name in STEPS:
            place, _, attribute = f"module.{name}".rpartition(".")
            owner = {"module": module, "module.Path": Path, "module.RunLog": RunLog}[place]
            setattr(owner, attribute, killing(getattr(owner, attribute)))

        log = RunLog(folder) if is_run(folder) else RunLog.create(folder)
        with log.writing():
            for _ in range(5):
                log.append("batch", {"n": len(log.records)})
                os.write(writing, b".")
        os._exit(0)

    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        return len(pipe.read())


def test_killed_before_every_step_of_every_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """File, name, folder, line, head: after a kill before any of them the records are those acknowledged, or one more.

    A head is never ahead of the records, so none is taken for lost."""
    finished = 0
    for step in itertools.count():
        folder = tmp_path / str(step)
        n_acknowledged = appended(folder, step)
        if not is_run(folder):
            continue
        records = RunLog(folder).records
        assert n_acknowledged <= len(records) <= n_acknowledged + 1
        counted = Head.parse((folder / HEAD).read_bytes()) if (folder / HEAD).exists() else None
        assert len(records) - (0 if counted is None else counted.records) in (0, 1)
        # Of a run with one record and nothing beside it, there may have been more.
        assert ("lost" in caplog.text) == (len(records) == 1 and counted is None and not (folder / LOG).exists())
        caplog.clear()

        # Killed once more at the same step of the next writer, which mends first, and then finished.
        n_more = appended(folder, step)
        assert len(RunLog(folder).records) in (len(records) + n_more, len(records) + n_more + 1)
        assert appended(folder, None) == 5
        log = RunLog(folder)
        log.verify()
        assert [record.body["n"] for record in log.records] == list(range(len(log.records)))
        assert Head.parse((folder / HEAD).read_bytes()) == Head(len(log.records), log.chain)

        finished += n_acknowledged == 5
        if finished:
            break
    assert step > 5 * len(STEPS)


@pytest.fixture
def python_handles_ctrl_c() -> Iterator[None]:
    """Python's own handler, without which a shell's background job starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_ctrl_c_finishes_the_batch_and_a_second_one_abandons_it(
    fast_editor: Make, stream: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastedit.methods.closed_form.recipe as base

    real, presses = base.optimise_values, []

    def pressed(model: object, edits: EditSet, *rest: object) -> object:
        for _ in range(presses.pop(0) if presses else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return real(model, edits, *rest)

    monkeypatch.setattr(base, "optimise_values", pressed)

    # Once in the second batch: it is finished. Twice in the next one: it is abandoned.
    for wanted in ([0, 1], [2]):
        presses[:] = wanted
        editor = fast_editor()
        with pytest.raises(KeyboardInterrupt):
            editor.edit(stream, BATCH, run_dir=tmp_path / "run", resume=True)
        assert len(editor.edits) == 2 * BATCH
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    editor, plain = fast_editor(), fast_editor()
    editor.edit(stream, BATCH, run_dir=tmp_path / "run", resume=True)
    plain.edit(stream, BATCH)
    assert editor.weights.fingerprint() == plain.weights.fingerprint()
