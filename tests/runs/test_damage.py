"""A damaged run: what is whole stays readable, nothing is silently shorter, and what cannot be read is kept."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastedit.editor import Editor
from fastedit.records.edit import EditSet
from fastedit.runs.head import HEAD
from fastedit.runs.log import LOCK, LOG, DamagedRun, RunError, RunLog
from fastedit.runs.recorder import Recorder

BATCH = 3
Make = Callable[..., Editor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log of six records."""
    log = RunLog.create(tmp_path / "run")
    with log.writing():
        for number in range(6):
            log.append("batch", {"n": number})
    return tmp_path / "run"


def record(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def flip(path: Path, place: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestNeverShorter:
    """A log that is lost or cut, and a record that is missing or damaged."""

    @pytest.mark.parametrize("lines", [0, 2, None], ids=["no lines", "two lines", "no log"])
    @pytest.mark.parametrize("fault", ["gone", "flipped"])
    def test_later_files_are_named_and_kept(self, lines: int | None, fault: str, folder: Path) -> None:
        cut_log(folder, lines)
        record(folder, 3).unlink() if fault == "gone" else flip(record(folder, 3), 40)
        before = contents(folder)

        for read in (RunLog, mend):
            with pytest.raises(DamagedRun, match=r"000003\.safetensors: .*000004\.safetensors, 000005") as refused:
                read(folder)
            assert "undo --to" in str(refused.value)
        assert contents(folder) == before

    def test_the_first_record_too(self, folder: Path) -> None:
        (folder / LOG).unlink()
        record(folder, 0).unlink()
        with pytest.raises(DamagedRun, match=r"000000\.safetensors: is missing"):
            RunLog(folder)
        with pytest.raises(RunError, match="holds a run already"):
            RunLog.create(folder)

    @pytest.mark.parametrize("lines", [5, 3, 0, None], ids=["last line", "three lines", "all lines", "no log"])
    @pytest.mark.parametrize("gone", [[5], [4, 5]], ids=["one record", "two records"])
    def test_the_last_records_with_their_lines(self, lines: int | None, gone: list[int], folder: Path) -> None:
        """Nothing is wrong with what is left, but it is less than was written."""
        lines = None if lines is None else min(lines, gone[0])
        cut_log(folder, lines)
        for number in gone:
            record(folder, number).unlink()
        before = contents(folder)

        named = rf"{record(folder, gone[0]).name}.* are missing, {HEAD} counts 6 records; .*undo --to"
        for read in (RunLog, mend):
            with pytest.raises(DamagedRun, match=named):
                read(folder)
        assert contents(folder) == before

        # Read up to the damage, and gone on from there.
        log = RunLog(folder, up_to_damage=True)
        assert [each.body["n"] for each in log.records] == list(range(gone[0]))
        with log.writing(rescue=True):
            log.append("batch", {"n": "new"})
        assert [each.body["n"] for each in RunLog(folder).records] == [*range(gone[0]), "new"]
        assert (folder / "damaged" / HEAD).is_file()

    def test_another_run_in_its_place(self, folder: Path, tmp_path: Path) -> None:
        other = RunLog.create(tmp_path / "other")
        with other.writing():
            for number in range(7):
                other.append("batch", {"n": number})
        shutil.copyfile(folder / HEAD, tmp_path / "other" / HEAD)
        with pytest.raises(DamagedRun, match=f"{HEAD}: counts other records than these"):
            RunLog(tmp_path / "other")

    def test_a_lost_head_is_told_and_written_anew(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        good = (folder / HEAD).read_bytes()
        (folder / HEAD).unlink()
        with caplog.at_level(logging.WARNING):
            assert len(RunLog(folder).records) == 6
        assert "no head counts the records; later ones, if there were any, are lost" in caplog.text
        mend(folder)
        assert (folder / HEAD).read_bytes() == good

    @pytest.mark.parametrize("damage", ["lost", "damaged"])
    def test_a_head_that_is_no_use_is_told_once(
        self, damage: str, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        if damage == "lost":
            (folder / HEAD).unlink()
        else:
            (folder / HEAD).write_bytes(b"{}")
        with caplog.at_level(logging.WARNING):
            RunLog(folder, quiet=True)
        assert not caplog.records

        log = RunLog(folder)
        told = [line.getMessage() for line in caplog.records]
        with log.writing():
            log.append("batch", {"n": 6})
        assert [line.getMessage() for line in caplog.records] == told

        # Lost once more, it is told once more.
        (folder / HEAD).unlink()
        log.reload()
        assert len(caplog.records) == len(told) + 1

    def test_a_lost_log_is_told(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        (folder / LOG).unlink()
        with caplog.at_level(logging.WARNING):
            assert len(RunLog(folder).records) == 6
        assert "is lost or empty, read from the record files up to 000005" in caplog.text
        assert "are lost" not in caplog.text

        (folder / HEAD).unlink()
        record(folder, 5).unlink()
        assert len(RunLog(folder).records) == 5
        assert "later ones, if there were any, are lost" in caplog.text

    def test_an_older_head_is_right_too(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        """After a kill before it was replaced, or after a version without one has written."""
        older = (folder / HEAD).read_bytes()
        log = RunLog(folder)
        with log.writing():
            log.append("batch", {"n": 6})
            log.append("batch", {"n": 7})
        newer = (folder / HEAD).read_bytes()
        (folder / HEAD).write_bytes(older)
        assert len(RunLog(folder).records) == 8
        mend(folder)
        assert (folder / HEAD).read_bytes() == newer
        assert not caplog.records

    @pytest.mark.parametrize("kind", ["folder", "link", "pipe", "dangling link"])
    def test_what_stands_in_place_of_the_head(self, kind: str, folder: Path, tmp_path: Path) -> None:
        (folder / HEAD).unlink()
        mine = tmp_path / "mine.txt"
        mine.write_text("mine")
        place = {
            "folder": lambda: (folder / HEAD).mkdir(),
            "link": lambda: (folder / HEAD).symlink_to(mine),
            "pipe": lambda: os.mkfifo(folder / HEAD),
            "dangling link": lambda: (folder / HEAD).symlink_to(tmp_path / "nowhere"),
        }
        place[kind]()
        assert len(mend(folder).records) == 6
        assert mine.read_text() == "mine"
        assert (folder / HEAD).is_dir() == (kind == "folder")
        assert not (tmp_path / "nowhere").exists()


def mend(folder: Path) -> RunLog:
    log = RunLog(folder)
    with log.writing():
        return log


def cut_log(folder: Path, lines: int | None) -> None:
    path = folder / LOG
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]) if lines is not None else b"")
    if lines is None:
        path.unlink()


class TestRescue:
    def test_a_damaged_line_is_rebuilt_and_the_log_kept(self, folder: Path) -> None:
        wanted = [each.chain for each in RunLog(folder).records]
        lines = (folder / LOG).read_bytes().splitlines(keepends=True)
        (folder / LOG).write_bytes(b"".join([*lines[:2], b'{"x": 1}\n', *lines[3:]]))
        damaged = (folder / LOG).read_bytes()

        log = RunLog(folder, up_to_damage=True)
        assert [each.chain for each in log.records] == wanted
        assert f"{LOG} line 3" in str(log.damage)
        with log.writing(rescue=True):
            assert [each.chain for each in log.records] == wanted
        assert (folder / "damaged" / LOG).read_bytes() == damaged
        assert [each.chain for each in RunLog(folder).records] == wanted

    def test_files_that_cannot_be_read_are_moved(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        cut_log(folder, None)
        record(folder, 2).unlink()
        later = {number: record(folder, number).read_bytes() for number in (3, 4, 5)}

        log = RunLog(folder, up_to_damage=True)
        with log.writing(rescue=True):
            log.append("batch", {"n": "new"})
        assert "set aside" in caplog.text
        assert [each.body["n"] for each in RunLog(folder).records] == [0, 1, "new"]
        assert {number: record(folder / "damaged", number).read_bytes() for number in later} == later

        # A second rescue overwrites nothing of the first.
        flip(folder / LOG, 40)
        with RunLog(folder, up_to_damage=True).writing(rescue=True):
            pass
        assert (folder / "damaged-2" / LOG).is_file()
        assert record(folder / "damaged", 3).read_bytes() == later[3]

    def test_nothing_is_set_aside_without_being_asked(self, folder: Path) -> None:
        flip(folder / LOG, 40)
        with pytest.raises(DamagedRun), RunLog(folder, up_to_damage=True).writing():
            pytest.fail("wrote")
        assert not (folder / "damaged").exists()


def harm(path: Path, chance: random.Random) -> str:
    """Damage a file in one of the ways that disks and people know."""
    data = path.read_bytes()
    place = chance.randrange(len(data))
    kind = chance.choice(["gone", "emptied", "cut", "flipped", "flipped", "zeros"])
    changed = {
        "gone": b"",
        "emptied": b"",
        "cut": data[:place],
        "flipped": data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :],
        "zeros": data[:place] + b"\0" * (len(data) - place),
    }
    path.write_bytes(changed[kind])
    if kind == "gone":
        path.unlink()
    return kind


@pytest.mark.parametrize("seed", range(6))
def test_a_campaign_of_damage(seed: int, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One to four files damaged at once, fifty times: a run is whole, or the damage is told; a rescue loses nothing."""
    chance = random.Random(seed)
    whole = [each.chain for each in RunLog(folder).records]
    for number in range(50):
        caplog.clear()
        copy = Path(shutil.copytree(folder, tmp_path / str(number)))
        names = sorted(path.name for path in copy.iterdir() if path.name != LOCK)
        hit = chance.sample(names, chance.randint(1, 3)) + [LOG] * chance.randint(0, 1)
        kinds = [harm(copy / name, chance) for name in dict.fromkeys(hit) if (copy / name).stat().st_size]
        before = {data for name, data in contents(copy).items() if data and name != HEAD}

        wrong = opened(copy)
        # The end of the log, the last files and the head gone: a warning says that no head counts the records.
        if wrong is None and [each.chain for each in RunLog(copy).records] != whole:
            assert LOG in hit, (hit, kinds)
            assert HEAD in hit, (hit, kinds)
            assert HEAD in caplog.text or "no head counts" in caplog.text, (hit, kinds)

        rescued = RunLog(copy, up_to_damage=True)
        with rescued.writing(rescue=True):
            rescued.append("rewind", {"keep": 0})
        chains = [each.chain for each in RunLog(copy).records]
        assert chains[:-1] == whole[: len(chains) - 1]
        # What was in the folder before is there still, but for the head, and for lines that were torn, which files
        # replace.
        kept = set(contents(copy).values())
        lost = [data for data in before if data not in kept and not any(data[:40] == other[:40] for other in kept)]
        assert not lost, (hit, kinds)


def opened(folder: Path) -> str | None:
    """What is wrong with a run, as a reader sees it who checks every byte."""
    try:
        RunLog(folder).verify()
    except RunError as error:
        return str(error)
    return None


class TestReaders:
    def test_a_reader_writes_nothing_and_takes_no_lock(self, folder: Path) -> None:
        with open(folder / LOG, "ab") as file:
            file.write(b'{"torn')
        (folder / "000006.partial").write_bytes(b"half")
        (folder / LOCK).unlink()
        before = contents(folder)
        log = RunLog(folder)
        log.verify()
        assert len(log.records) == 6
        assert contents(folder) == before

        with log.writing():
            assert len(RunLog(folder).records) == 6

    def test_an_opened_run_stays_as_it_is(self, finished: Path, fast_editor: Make, tmp_path: Path) -> None:
        """With all that a writer would mend, and its log a link to a file of somebody else."""
        (finished / LOCK).unlink()
        shutil.move(finished / LOG, tmp_path / "mine.jsonl")
        with open(tmp_path / "mine.jsonl", "ab") as file:
            file.write(b'{"torn')
        (finished / LOG).symlink_to(tmp_path / "mine.jsonl")
        (finished / "000009.partial").write_bytes(b"half")

        before = contents(finished)
        editor = Editor.resume(finished, fast_editor().adapter, progress=False)
        assert len(editor.edits) == 15
        assert contents(finished) == before

    def test_what_others_wrote_since_it_was_read_is_no_base_to_write_on(
        self, finished: Path, fast_editor: Make, stream: EditSet
    ) -> None:
        late = Recorder.open(finished)
        editor = fast_editor()
        editor.edit(stream, BATCH, run_dir=finished, resume=True)
        editor.undo()
        with pytest.raises(RunError, match="open it again"), late.log.writing():
            pytest.fail("wrote")

    @pytest.mark.parametrize("name", [LOG, LOCK])
    def test_nothing_is_written_through_a_link(self, name: str, folder: Path, tmp_path: Path) -> None:
        mine = tmp_path / "mine.txt"
        shutil.move(folder / name, mine)
        with open(mine, "ab") as file:
            file.write(b"a torn line, or my own text")
        (folder / name).symlink_to(mine)

        before = mine.read_bytes()
        log = RunLog(folder)
        with pytest.raises(RunError, match=f"{name}: is a symbolic link"), log.writing():
            pytest.fail("wrote")
        assert mine.read_bytes() == before

    def test_a_pipe_in_place_of_the_log_does_not_hang(self, folder: Path) -> None:
        (folder / LOG).unlink()
        os.mkfifo(folder / LOG)
        assert len(RunLog(folder).records) == 6
        with pytest.raises(RunError, match="no plain file"), RunLog(folder).writing():
            pytest.fail("wrote")

    def test_a_pipe_in_place_of_a_record_does_not_hang(self, folder: Path) -> None:
        record(folder, 2).unlink()
        os.mkfifo(record(folder, 2))
        with pytest.raises(DamagedRun, match=r"000002\.safetensors: cannot be read \(no plain file\)"):
            RunLog(folder).verify()


class TestUnderAWriter:
    """What happens to the folder while a writer holds it is noticed before the next record."""

    @pytest.mark.parametrize("again", [False, True], ids=["deleted", "replaced"])
    def test_the_lock_file(self, again: bool, folder: Path) -> None:
        log = RunLog(folder)
        with log.writing():
            (folder / LOCK).rename(folder / "gone")
            if again:
                (folder / LOCK).touch()
            with pytest.raises(RunError, match="lock: was deleted or replaced"):
                log.append("batch", {"n": 6})
        assert len(RunLog(folder).records) == 6

    @pytest.mark.parametrize("name", ["000002.safetensors", LOG])
    def test_a_file(self, name: str, folder: Path) -> None:
        log = RunLog(folder)
        with log.writing():
            log.append("batch", {"n": 6})
            (folder / name).rename(folder.parent / name)
            with pytest.raises(DamagedRun, match=f"{name} vanished"):
                log.append("batch", {"n": 7})
        assert not record(folder, 7).exists()

    def test_the_log_changed(self, folder: Path) -> None:
        log = RunLog(folder)
        with log.writing():
            with open(folder / LOG, "ab") as file:
                file.write(b"x")
            with pytest.raises(DamagedRun, match="was changed while"):
                log.append("batch", {"n": 6})

    def test_an_emptied_folder_stops_the_stream_with_nothing_written(
        self, fast_editor: Make, stream: EditSet, tmp_path: Path
    ) -> None:
        editor, prints = fast_editor(), []

        class Empties:
            def begin(self) -> None: ...

            def after_batch(self, report: object, last: bool) -> None:
                prints.append(editor.weights.fingerprint())
                for path in (tmp_path / "run").iterdir():
                    path.unlink()

        with pytest.raises(RunError, match="lock: was deleted"):
            editor.edit(stream, BATCH, run_dir=tmp_path / "run", watch=Empties())
        assert prints == [editor.weights.fingerprint()]
        assert not list((tmp_path / "run").glob("*.safetensors"))


class TestOfBatches:
    """A record of a batch that is damaged costs this batch and those after it."""

    @pytest.fixture
    def damaged(self, finished: Path) -> Path:
        """Five batches in records 2 to 6, of which the fourth is damaged."""
        flip(record(finished, 5))
        return finished

    def resumed(self, folder: Path, make: Make, to: int | None = None) -> Editor:
        made = make()
        return Editor.resume(folder, made.adapter, moments=made.state.moments, progress=False, to=to)

    def test_the_batches_before_it_are_read_and_told(
        self, damaged: Path, fast_editor: Make, stream: EditSet, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(DamagedRun, match=r"000005\.safetensors.*first 3 batches.*undo --to 3"):
            self.resumed(damaged, fast_editor)
        editor, plain = self.resumed(damaged, fast_editor, to=3), fast_editor()
        plain.edit(stream[:9], BATCH)
        assert editor.weights.fingerprint() == plain.weights.fingerprint()
        with pytest.raises(RunError, match="only its first 3 batches were opened"):
            editor.edit(stream[9:12])
        with pytest.raises(RunError, match="only its first 3 batches were opened"):
            editor.undo()
        with pytest.raises(RunError, match="5 batches are in force, asked for the first 6"):
            self.resumed(damaged, fast_editor, to=6)

    def test_undone_to_before_it_the_run_goes_on(
        self, damaged: Path, fast_editor: Make, stream: EditSet, caplog: pytest.LogCaptureFixture
    ) -> None:
        recorder = Recorder.open(damaged)
        with recorder.log.writing():
            recorder.rewind(3)
        editor, plain = self.resumed(damaged, fast_editor), fast_editor()
        assert "nothing in force needs it" in caplog.text
        editor.edit(stream[9:], BATCH)
        plain.edit(stream, BATCH)
        assert editor.weights.fingerprint() == plain.weights.fingerprint()
        assert self.resumed(damaged, fast_editor).weights.fingerprint() == plain.weights.fingerprint()

    def test_a_damaged_snapshot_costs_nothing(
        self, fast_editor: Make, stream: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("fastedit.runs.recorder.SNAPSHOT_SHARE", 0.01)
        editor = fast_editor()
        editor.edit(stream, BATCH, run_dir=tmp_path / "run")
        snapshots = [each.number for each in RunLog(tmp_path / "run").records if each.kind == "snapshot"]
        assert len(snapshots) > 1
        for number in reversed(snapshots):
            flip(record(tmp_path / "run", number))
            again = self.resumed(tmp_path / "run", fast_editor)
            assert again.weights.fingerprint() == editor.weights.fingerprint()
