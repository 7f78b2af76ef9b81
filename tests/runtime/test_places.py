"""Places for results: refused before the work, and never half written, whatever happens on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastedit.runtime import places
from fastedit.runtime.places import (
    NotSaved,
    PlaceError,
    check_file,
    check_folder,
    check_room,
    equal_bits,
    new_file,
    new_folder,
    save_tensors,
)


def tree(folder: Path) -> dict[str, str]:
    """Names and contents of the files in a folder."""
    return {file.name: file.read_text() for file in folder.iterdir()}


def fails_in_folder(folder: Path) -> None:
    with contextlib.suppress(KeyError), new_folder(folder) as place:
        (place / "config.json").write_text("half")
        raise KeyError


class TestCheckFolder:
    @pytest.mark.parametrize("name", ["absent", "empty", "a/b/c"])
    def test_a_free_place_is_left_as_it_was(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        check_folder(tmp_path / name)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty"]

    def test_a_file_a_dangling_link_and_a_place_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "nothing")
        for name, why in [("file", "a file stands there"), ("link", "link to nothing"), ("file/x", "is no folder")]:
            with pytest.raises(PlaceError, match=why):
                check_folder(tmp_path / name)

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(PlaceError, match=r"cannot be written.*name another place"):
            check_folder(tmp_path / ("x" * 300))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_without_permission(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(PlaceError, match="cannot be written"):
            check_folder(tmp_path / "out")

    def test_what_cannot_be_created_is_tried(self, tmp_path: Path) -> None:
        with pytest.raises(PlaceError, match=r"cannot be written|is no folder"):
            check_folder("/proc/fastedit")

    def test_an_earlier_result_is_replaced_only_when_asked(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(PlaceError, match=r"is not empty.*--force \(force=True\)"):
            check_folder(tmp_path)
        check_folder(tmp_path, force=True)

    @pytest.mark.parametrize("force", [False, True])
    def test_the_source_stays(self, force: bool, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        (tmp_path / "model" / "weights.gguf").write_text("")
        (tmp_path / "link").symlink_to(tmp_path / "model")

        kept = [tmp_path / "model", tmp_path / "model" / "weights.gguf"]
        for place in (tmp_path / "model", tmp_path / "link", tmp_path):
            for keep in kept:
                with pytest.raises(PlaceError, match="would be overwritten"):
                    check_folder(place, force, [keep])
        check_folder(tmp_path / "model" / "edited", force, kept)

    def test_a_full_disk(self, tmp_path: Path) -> None:
        check_room(tmp_path / "not" / "yet", 10)
        with pytest.raises(PlaceError, match=r"needs 1000000000\.00 GB, and its disk has"):
            check_room(tmp_path / "not" / "yet", 10**18)


class TestCheckFile:
    def test_what_stands_there(self, tmp_path: Path) -> None:
        check_file(tmp_path / "a" / "new")
        assert not list(tmp_path.iterdir())

        (tmp_path / "old").write_text("mine")
        check_file(tmp_path / "old", force=True)
        with pytest.raises(PlaceError, match=r"stands already.*--force"):
            check_file(tmp_path / "old")
        with pytest.raises(PlaceError, match="a folder stands there"):
            check_file(tmp_path, force=True)
        with pytest.raises(PlaceError, match="no ordinary file"):
            check_file("/dev/null", force=True)


class TestNewFolder:
    def test_all_files_or_none(self, tmp_path: Path) -> None:
        for name in ("absent", "deep/er", "empty"):
            (tmp_path / "empty").mkdir(exist_ok=True)
            fails_in_folder(tmp_path / name)
            assert not (tmp_path / name).exists() or not list((tmp_path / name).iterdir())

            with new_folder(tmp_path / name) as folder:
                (folder / "config.json").write_text("whole")
            assert tree(tmp_path / name) == {"config.json": "whole"}
        assert {path.name for path in tmp_path.rglob("*")} == {"absent", "deep", "er", "empty", "config.json"}

    def test_an_earlier_result_goes_and_all_else_stays(self, tmp_path: Path) -> None:
        for name in ("config.json", "model-00002-of-00002.safetensors", "thesis.tex", "other.gguf"):
            (tmp_path / name).write_text("old")
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "model.safetensors").write_text("mine")

        stale = ("config.json", "model*.safetensors")
        with pytest.raises(KeyError), new_folder(tmp_path, force=True, stale=stale):
            raise KeyError
        assert len(list(tmp_path.iterdir())) == 5

        with new_folder(tmp_path, force=True, stale=stale) as folder:
            (folder / "config.json").write_text("new")
        assert (tmp_path / "photos" / "model.safetensors").read_text() == "mine"
        (tmp_path / "photos" / "model.safetensors").unlink()
        (tmp_path / "photos").rmdir()
        assert tree(tmp_path) == {"config.json": "new", "thesis.tex": "old", "other.gguf": "old"}

    def test_a_folder_with_the_name_of_a_new_file_costs_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("old")
        (tmp_path / "model.safetensors").mkdir()
        for _ in range(2):
            with (
                pytest.raises(NotSaved, match=r"not saved \(a folder there is named model\.safetensors\)"),
                new_folder(tmp_path, force=True, stale=("config.json",)) as folder,
            ):
                (folder / "model.safetensors").write_text("new")
            assert (tmp_path / "config.json").read_text() == "old"
            assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}

    def test_files_may_be_read_by_who_reads_the_folder(self, tmp_path: Path) -> None:
        with new_folder(tmp_path / "out") as folder:
            save_tensors({"a": torch.zeros(2)}, folder / "a.safetensors", {})
        mode = (tmp_path / "out" / "a.safetensors").stat().st_mode
        assert mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666

    @pytest.mark.parametrize("exists", [False, True])
    @pytest.mark.parametrize("moment", ["writing", "moving"])
    def test_after_a_kill_the_next_try_succeeds(self, exists: bool, moment: str, tmp_path: Path) -> None:
        if exists:
            (tmp_path / "out").mkdir()
        script = f"""
            import os, signal
            from pathlib import Path
            from fastedit.runtime.places import new_folder

            rename = Path.rename
            def dies(self, to):
                # The file by which a result is known has been left for the end.
                if self.name in ("config.json", ".out.partial"):
                    os.kill(os.getpid(), signal.SIGKILL)
                return rename(self, to)

            with new_folder({str(tmp_path / "out")!r}) as folder:
                (folder / "config.json").write_text("one")
                (folder / "model.safetensors").write_text("one")
                if {moment!r} == "writing":
                    os.kill(os.getpid(), signal.SIGKILL)
                Path.rename = dies
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "out" / "config.json").exists()
        # It comes last: what stands there without it is nothing that anybody loads.
        assert (tmp_path / "out" / "model.safetensors").exists() == (exists and moment == "moving")

        with new_folder(tmp_path / "out") as folder:
            (folder / "config.json").write_text("two")
            (folder / "model.safetensors").write_text("two")
        assert tree(tmp_path / "out") == {"config.json": "two", "model.safetensors": "two"}
        assert {path.name for path in tmp_path.iterdir()} == {"out"}

    def test_a_kill_while_the_place_was_tried_does_not_fill_it(self, tmp_path: Path) -> None:
        (tmp_path / f"{places.TRIAL}x1y2").mkdir()
        with new_folder(tmp_path) as folder:
            (folder / "config.json").write_text("new")
        assert (tmp_path / "config.json").read_text() == "new"

    def test_files_of_others_survive_a_retry(self, tmp_path: Path) -> None:
        """A kill left the folder of partial files; since then somebody put a file beside it."""
        (tmp_path / places.PARTIAL).mkdir()
        (tmp_path / "notes.txt").write_text("mine")
        with new_folder(tmp_path) as folder:
            (folder / "config.json").write_text("new")
        assert tree(tmp_path) == {"config.json": "new", "notes.txt": "mine"}


class TestNewFile:
    def test_all_or_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "file"
        with new_file(path) as part:
            part.write_text("one")
        with pytest.raises(PlaceError, match="stands already"), new_file(path) as part:
            part.write_text("two")
        with contextlib.suppress(KeyError), new_file(path, force=True) as part:
            part.write_text("two")
            raise KeyError
        assert tree(path.parent) == {"file": "one"}

        with new_file(path, force=True) as part:
            part.write_text("two")
        assert tree(path.parent) == {"file": "two"}


class TestSaveTensors:
    def test_what_was_written_is_read(self, tmp_path: Path) -> None:
        tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor([0.0, -0.0, torch.nan]), "c": torch.arange(3)}
        save_tensors(tensors, tmp_path / "t.safetensors", {"about": "it"})
        found = load_file(tmp_path / "t.safetensors")
        assert found.keys() == tensors.keys()
        assert all(equal_bits(found[name], tensor.contiguous()) for name, tensor in tensors.items())

    def test_a_file_that_holds_something_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def flips(tensors: dict[str, torch.Tensor], path: Path, about: dict[str, str]) -> None:
            save(tensors, path, about)
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

        save = places.save_file
        monkeypatch.setattr(places, "save_file", flips)
        with pytest.raises(NotSaved, match="a is not in the file as it was written"):
            save_tensors({"a": torch.ones(2)}, tmp_path / "t.safetensors", {})

    def test_bits(self) -> None:
        assert equal_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
        assert not equal_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
        assert not equal_bits(torch.zeros(2), torch.zeros(2, 1))
        assert not equal_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("writer", ["python", "safetensors"])
def test_a_disk_that_takes_no_more_is_one_sentence(
    writer: str, exists: bool, file_limit: Callable[..., Any], tmp_path: Path
) -> None:
    if exists:
        (tmp_path / "out").mkdir()

    with file_limit(100_000), pytest.raises(NotSaved, match=r"out.*: not saved \(.*File too large") as told:
        _write_a_megabyte(tmp_path / "out", writer)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def _write_a_megabyte(place: Path, writer: str) -> None:
    with new_folder(place) as folder:
        if writer == "python":
            (folder / "a").write_bytes(bytes(10**6))
        else:
            save_tensors({"a": torch.zeros(250_000)}, folder / "a", {})
