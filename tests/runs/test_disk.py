"""Full disks, folders without write permission, cut or changed files: the run resumes, or the error names the file."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastedit.editor import Editor
from fastedit.records.edit import EditSet
from fastedit.runs.head import HEAD
from fastedit.runs.log import LOG, DamagedRun, RunLog, RunWriteError

BATCH = 3
Make = Callable[..., Editor]


@pytest.mark.parametrize("limit", [2_600, 12_000, 21_145])
def test_full_disk_stops_cleanly_and_resumes(limit: int, fast_editor: Make, stream: EditSet, tmp_path: Path) -> None:
    """The kernel lets no file grow past the limit, which is reached in a line of the log, in the file of the first
    batch, or in that of a later one."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            editor = fast_editor()
            _ = editor.state
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                editor.edit(stream, BATCH, run_dir=tmp_path / "run")
            except RunWriteError as error:
                code = 77 if "File too large" in str(error) else 2
        finally:
            os._exit(code)

    _, status = os.waitpid(child, 0)
    largest = max(path.stat().st_size for path in (tmp_path / "run").iterdir())
    assert os.waitstatus_to_exitcode(status) == 77, largest
    assert largest <= limit

    RunLog(tmp_path / "run").verify()
    editor, plain = fast_editor(), fast_editor()
    editor.edit(stream, BATCH, run_dir=tmp_path / "run", resume=True)
    plain.edit(stream, BATCH)
    assert editor.weights.fingerprint() == plain.weights.fingerprint()


def test_folder_that_cannot_be_written(
    finished: Path, fast_editor: Make, stream: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    editor = fast_editor()
    before = editor.weights.fingerprint()
    with pytest.raises(OSError, match="file"):
        editor.edit(stream, BATCH, run_dir=tmp_path / "file" / "run")
    assert editor.weights.fingerprint() == before

    real = os.open

    def read_only(path: str, flags: int, *rest: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and str(finished) in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *rest)

    later = Editor.resume(finished, fast_editor().adapter, moments=editor.state.moments, progress=False)
    monkeypatch.setattr(os, "open", read_only)
    before = later.weights.fingerprint()
    with pytest.raises(OSError, match="Permission denied"):
        later.edit(stream[:1])
    assert later.weights.fingerprint() == before

    # Reading needs no permission to write.
    again = Editor.resume(finished, fast_editor().adapter, moments=editor.state.moments, progress=False)
    assert again.weights.fingerprint() == before


@pytest.mark.parametrize("fault", ["cut", "flipped", "emptied", "gone"])
def test_every_file_cut_flipped_emptied_or_gone(fault: str, finished: Path, tmp_path: Path) -> None:
    """Either the run is whole again when it is opened, or the file is named."""
    whole = RunLog(finished).chain
    for path in sorted(finished.iterdir()):
        if path.name == "lock":
            continue
        for place in (0, 9, path.stat().st_size // 2, path.stat().st_size - 2):
            copy = Path(shutil.copytree(finished, tmp_path / "copy"))

            data = path.read_bytes()
            if fault == "gone":
                (copy / path.name).unlink()
            else:
                flipped = data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :]
                (copy / path.name).write_bytes({"cut": data[:place], "emptied": b"", "flipped": flipped}[fault])

            named = opened(copy)
            if named is None:
                assert path.name in (LOG, HEAD)
                assert RunLog(copy).chain == whole
            else:
                assert path.name in named
                assert path.name != LOG or fault == "flipped"
            shutil.rmtree(copy)


def opened(folder: Path) -> str | None:
    """Open a run for writing and verify it; the message about damage, None when there is none."""
    try:
        log = RunLog(folder)
        with log.writing():
            log.verify()
    except DamagedRun as error:
        return str(error)
    return None
