"""A hundred faults while a result is saved: kills, full disks, places that change. Never half a result or a traceback.

One process loads and edits; a fork of it saves, and is killed, limited or disturbed at a drawn moment.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastedit.editor import Editor
from fastedit.records.edit import EditSet
from fastedit.runtime.hashing import tensor_bytes
from fastedit.runtime.places import NotSaved, PlaceError

FORMS = ("checkpoint", "delta", "lora")
FAULTS = ("kill", "limit", "folder deleted", "file in the way", "folder filled")
N_FAULTS = 100
KNOWN = {"checkpoint": "config.json", "delta": "delta.safetensors", "lora": "adapter_config.json"}


@pytest.mark.slow
def test_a_hundred_faults_while_saving(tiny_editor: Callable[..., Editor], tiny_facts: EditSet, tmp_path: Path) -> None:
    editor = tiny_editor()
    editor.edit(tiny_facts[:4])
    wanted, seconds = {}, {}
    for form in FORMS:
        started = time.perf_counter()
        editor.export(tmp_path / "wanted" / form, form)
        seconds[form] = time.perf_counter() - started
        wanted[form] = contents(tmp_path / "wanted" / form)

    draw = random.Random(0)
    seen: Counter[str] = Counter()
    for number in range(N_FAULTS):
        form, fault = draw.choice(FORMS), FAULTS[number % len(FAULTS)]
        place = tmp_path / str(number)
        if draw.random() < 0.5:
            place.mkdir()

        ended = disturbed(editor, form, place, fault, draw, seconds[form])
        seen[f"{fault}: {ended}"] += 1
        assert ended in ("saved", "refused", "not saved", "killed"), (number, form, fault, ended)
        whole = (place / KNOWN[form]).is_file()
        # Who deletes files may delete them from what was saved.
        if fault == "folder deleted":
            shutil.rmtree(place, ignore_errors=True)
        elif whole:
            assert contents(place) == wanted[form], (number, form, fault)
        else:
            assert ended != "saved", (number, form, fault)

        retry(editor, form, place, wanted[form])
        shutil.rmtree(place)
    print(dict(sorted(seen.items())))
    assert {"kill: killed", "limit: not saved", "file in the way: refused"} <= set(seen)


def contents(folder: Path) -> dict[str, object]:
    """The files of a result; of those with tensors, the tensors, because their metadata may stand in any order."""
    return {
        file.name: {name: bytes(tensor_bytes(tensor)) for name, tensor in load_file(file).items()}
        if file.suffix == ".safetensors"
        else file.read_bytes()
        for file in folder.iterdir()
        if not file.name.startswith(".")
    }


def disturbed(editor: Editor, form: str, place: Path, fault: str, draw: random.Random, seconds: float) -> str:
    """How a save ends that meets a fault."""
    if fault == "file in the way":
        shutil.rmtree(place, ignore_errors=True)
        place.write_text("mine")
    limit = draw.choice((50, 500, 5_000, 50_000))

    child = os.fork()
    if child == 0:
        ended = 1
        try:
            ended = save(editor, form, place, limit if fault == "limit" else None)
        finally:
            os._exit(ended)

    if fault != "limit":
        time.sleep(draw.uniform(0, 1.1 * seconds))
    if fault == "kill":
        os.kill(child, signal.SIGKILL)
    elif fault == "folder deleted":
        for folder in (place, place.with_name(f".{place.name}.partial")):
            shutil.rmtree(folder, ignore_errors=True)
    elif fault == "folder filled":
        place.mkdir(exist_ok=True)
        (place / "notes.txt").write_text("mine")

    _, status = os.waitpid(child, 0)
    if fault == "file in the way":
        assert place.read_text() == "mine"
        place.unlink()
    if fault == "folder filled":
        assert (place / "notes.txt").read_text() == "mine"
        (place / "notes.txt").unlink()
    if os.WIFSIGNALED(status):
        return "killed"
    return {0: "saved", 3: "refused", 4: "not saved"}.get(os.WEXITSTATUS(status), "failed")


def save(editor: Editor, form: str, place: Path, limit: int | None) -> int:
    """Save, as the exit code of a process."""
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        editor.export(place, form)
    except PlaceError:
        return 3
    except NotSaved:
        return 4
    return 0


def retry(editor: Editor, form: str, place: Path, wanted: dict[str, object]) -> None:
    """The same command again: a whole result is refused until it is forced, everything else is made whole."""
    try:
        editor.export(place, form)
    except PlaceError:
        assert (place / KNOWN[form]).is_file()
        editor.export(place, form, force=True)
    assert contents(place) == wanted
