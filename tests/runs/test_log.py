"""The run log: what was appended is read back, what a crash leaves is mended, other bytes are named."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastedit.runs.head import HEAD
from fastedit.runs.log import FORMAT, LOCK, LOG, DamagedRun, LockedRun, RunError, RunLog
from fastedit.runtime.hashing import canonical, tensors_hash


def tensors(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"a": torch.randn(3, 5, generator=generator), "b": torch.arange(number, dtype=torch.int64)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log of four records, the third without tensors."""
    log = RunLog.create(tmp_path / "run")
    with log.writing():
        for number in range(4):
            log.append("batch", {"n": number, "loss": float("nan")}, {} if number == 2 else tensors(number))
    return tmp_path / "run"


def chains(folder: Path) -> list[str]:
    return [record.chain for record in RunLog(folder).records]


def mend(folder: Path) -> RunLog:
    log = RunLog(folder)
    with log.writing():
        return log


def test_records_come_back(folder: Path) -> None:
    log = RunLog(folder)
    log.verify()
    assert [(record.number, record.kind, record.body["n"]) for record in log.records] == [
        (number, "batch", number) for number in range(4)
    ]
    assert log.records[0].body["loss"] == "nan"
    for number in (0, 1, 3):
        read = log.tensors(number)
        assert read.keys() == {"a", "b"}
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors(number).items())
    assert log.tensors(2) == {}
    assert not list(folder.glob("*.partial"))
    assert all(json.loads(line) for line in (folder / LOG).read_bytes().splitlines())


@pytest.mark.parametrize("cut", [1, 7, 200], ids=lambda cut: f"{cut} bytes")
def test_torn_tail_is_cut_and_rebuilt(folder: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    before, path = chains(folder), folder / LOG
    path.write_bytes(path.read_bytes()[:-cut])
    torn = path.read_bytes()
    assert chains(folder) == before
    assert path.read_bytes() == torn
    with caplog.at_level(logging.WARNING):
        mend(folder)
    assert "torn tail" in caplog.text
    assert "record 3 had no line" in caplog.text
    assert chains(folder) == before


@pytest.mark.parametrize("kept", [0, 1, 3], ids=lambda kept: f"{kept} lines")
def test_log_cut_at_a_line_or_lost_is_rebuilt(folder: Path, kept: int) -> None:
    before, path = chains(folder), folder / LOG
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:kept]))
    if kept == 0:
        path.unlink()
    mend(folder).verify()
    assert chains(folder) == before


def test_zeros_at_the_end_are_a_torn_tail(folder: Path) -> None:
    before, path = chains(folder), folder / LOG
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + b"\0" * 40 + lines[3][40:])
    mend(folder)
    assert chains(folder) == before


def test_record_cut_before_its_rename_never_was(folder: Path) -> None:
    (folder / "000004.partial").write_bytes(b"half a rec")
    log = mend(folder)
    assert len(log.records) == 4
    assert not list(folder.glob("*.partial"))


def test_every_changed_byte_is_found_and_its_file_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in sorted(folder.iterdir()):
        if path.name == LOCK:
            continue
        good = path.read_bytes()
        # The last newline: without it the line counts as torn, and is rebuilt from its file.
        last = len(good) - 1 if path.name == LOG else len(good)
        for place in range(0, last, max(1, last // 60)):
            path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
            if path.name == HEAD:
                # Nothing needs it: it is told, and written anew.
                caplog.clear()
                mend(folder).verify()
                assert f"{HEAD}: is damaged" in caplog.text
                assert path.read_bytes() == good
                continue
            with pytest.raises(DamagedRun, match=path.name):
                mend(folder).verify()
        path.write_bytes(good)
    RunLog(folder).verify()


def test_missing_and_shortened_files_are_named(folder: Path) -> None:
    path = folder / "000001.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-3])
    with pytest.raises(DamagedRun, match=r"000001\.safetensors.*checksum"):
        RunLog(folder).verify()
    path.unlink()
    with pytest.raises(DamagedRun, match=r"000001\.safetensors.*cannot be read"):
        RunLog(folder).verify()


def test_swapped_and_dropped_lines_are_damage(folder: Path) -> None:
    path = folder / LOG
    lines = path.read_bytes().splitlines(keepends=True)
    for wrong in ([1, 0, 2, 3], [0, 2, 3], [0, 1, 1, 2, 3]):
        path.write_bytes(b"".join(lines[i] for i in wrong))
        with pytest.raises(DamagedRun, match=f"{LOG} line"):
            RunLog(folder)


def test_file_without_line_that_does_not_follow_is_damage(folder: Path) -> None:
    stranger = folder.parent / "other"
    other = RunLog.create(stranger)
    with other.writing():
        for number in range(5):
            other.append("batch", {"n": number})
    (folder / "000004.safetensors").write_bytes((stranger / "000004.safetensors").read_bytes())
    with pytest.raises(DamagedRun, match="does not follow record 3"):
        mend(folder)


def test_one_writer(folder: Path) -> None:
    first, second = RunLog(folder), RunLog(folder)
    with first.writing():
        with pytest.raises(LockedRun, match="another process is writing"), second.writing():
            pytest.fail("two writers")
        script = f"""
            from fastedit.runs.log import LockedRun, RunLog
            try:
                with RunLog({str(folder)!r}).writing():
                    print("entered")
            except LockedRun:
                print("locked")
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
        assert done.stdout.strip() == "locked", done.stderr
        first.append("batch", {"n": 4})
    with second.writing():
        pass
    late = RunLog(folder)
    with second.writing():
        second.append("batch", {"n": 5})
    with pytest.raises(RunError, match="open it again"), first.writing():
        pytest.fail("others have written since")
    with late.writing():
        assert len(late.records) == 6


def test_nothing_is_appended_without_the_lock(folder: Path) -> None:
    with pytest.raises(RunError, match="inside `writing"):
        RunLog(folder).append("batch", {})


def test_folders_that_hold_no_run_or_something_else(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        RunLog(tmp_path / "absent")
    with pytest.raises(RunError, match="holds a run already"):
        RunLog.create(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="must be empty or absent"):
        RunLog.create(tmp_path / "full")


def made_by_format(number: object, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run log of two records, as a version of that format writes it."""
    with monkeypatch.context() as newer:
        newer.setattr("fastedit.runs.log.FORMAT", number)
        log = RunLog.create(folder)
        with log.writing():
            log.append("run", {})
            log.append("stream", {}, tensors(1))
    return folder


def formats(folder: Path) -> list[str]:
    """The format that each record file names."""
    return [safe_open(path, "pt").metadata()["format"] for path in sorted(folder.glob("*.safetensors"))]


def test_a_new_run_says_its_format(folder: Path) -> None:
    log = RunLog(folder)
    assert log.format == FORMAT == 1
    assert ["format" in record.body for record in log.records] == [True, False, False, False]
    assert formats(folder) == ["fastedit run 1"] * 4


@pytest.mark.parametrize("number", [2, 17, 0, "x", None])
@pytest.mark.parametrize("rest", ["all", "files", "log"])
def test_a_format_that_is_not_known_is_refused(
    number: object, rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_by_format(number, tmp_path / "run", monkeypatch)
    for path in folder.glob("*.safetensors" if rest == "log" else LOG if rest == "files" else "nothing"):
        path.unlink()

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RunError, match=rf"run has format {number}, .*reads formats up to 1;") as refused:
        mend(folder)
    assert not isinstance(refused.value, DamagedRun)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_keeps_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made_by_format(1, tmp_path / "run", monkeypatch)
    monkeypatch.setattr("fastedit.runs.log.FORMAT", 2)
    log = RunLog(folder)
    with log.writing():
        log.append("batch", {})
    assert log.format == 1
    assert formats(folder) == ["fastedit run 1"] * 3

    # The last line is lost, and taken up again.
    lines = (folder / LOG).read_bytes().splitlines(keepends=True)
    (folder / LOG).write_bytes(b"".join(lines[:2]))
    assert len(mend(folder).records) == 3
    assert len(mend(made_by_format(2, tmp_path / "newer", monkeypatch)).records) == 2


def test_hash_tells_names_types_and_shapes_apart() -> None:
    zero = torch.zeros(4)
    kinds = [{"a": zero}, {"b": zero}, {"a": zero.view(2, 2)}, {"a": zero.to(torch.int32)}, {}, {"a": zero + 1}]
    assert len({tensors_hash(kind) for kind in kinds}) == len(kinds)
    assert tensors_hash({"a": zero, "b": zero + 1}) == tensors_hash({"b": zero + 1, "a": zero})
    assert canonical({"b": (1, float("inf")), "a": "é\ud800"}) == '{"a":"\\u00e9\\ud800","b":[1,"inf"]}'
