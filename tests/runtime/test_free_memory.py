"""Memory that was freed between blocks in use leaves the process."""

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastedit.editor import Editor
from fastedit.records.edit import EditSet
from fastedit.runtime.free_memory import give_back_freed

FRAGMENTED = """
from pathlib import Path
from fastedit.runtime.free_memory import give_back_freed

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

# Once a block of this size was freed, smaller ones come from the heap.
del (large := [bytearray(b"x") * (30 << 20)])[:]
blocks = [bytearray(b"x") * (1 << 20) for _ in range(200)]
kept = blocks[1::2]
del blocks
before = resident()
give_back_freed()
print(before - resident())
assert all(block == b"x" * (1 << 20) for block in kept)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc offers it")
def test_freed_blocks_between_others_leave_the_process() -> None:
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", FRAGMENTED], cwd=root, capture_output=True, text=True, check=True)
    assert int(run.stdout) > 80 << 20


def test_nothing_is_asked_of_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("fastedit.runtime.free_memory.ctypes.CDLL", asked.append)
    monkeypatch.setattr(sys, "platform", "win32")
    give_back_freed()
    assert asked == []


def test_a_c_library_that_does_not_offer_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("fastedit.runtime.free_memory.ctypes.CDLL", asked.append)
    monkeypatch.setattr(sys, "platform", "linux")
    give_back_freed()
    assert asked == [None]


def test_every_batch_gives_back_what_it_freed(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    editor = tiny_editor(value={"steps": 2})
    monkeypatch.setattr("fastedit.editing.stream.give_back_freed", lambda: given.append(len(editor.edits)))
    editor.edit(tiny_facts[:3], batch_size=1)
    assert given == [1, 2, 3]
