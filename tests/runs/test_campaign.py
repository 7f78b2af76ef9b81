"""Every kind of damage to every kind of file of a run, under every command: the right result, or one error.

No command may end in a traceback or wait for ever. None that succeeds may leave other weights than it does with an
undamaged run, and none that only reads may write.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from fastedit.cli.main import app
from fastedit.runs.head import HEAD
from fastedit.runs.log import LOCK, LOG, RunLog
from fastedit.runtime.hashing import tensors_hash

TINY = Path(__file__).resolve().parents[1] / "tiny"
MODEL, FACTS, TEXT = str(TINY / "model"), str(TINY / "facts.jsonl"), str(TINY / "text.txt")
SETTINGS = {
    "layers": "[2,3,4]",
    "covariance_weight": "100",
    "residual_min": "0.1",
    "residual_max": "1000",
    "value.steps": "3",
    "value.lr": "0.1",
    "moments.tokens": "4096",
    "moments.window": "64",
}
EDIT = ["edit", MODEL, FACTS, "--batch-size", "2", "--moments", TEXT, "--no-eval", "--preset", "smollm2-135m"]
EDIT += [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
N_BATCHES = 3
SECONDS = 30

READERS = {
    "log": ["log", "RUN"],
    "log --verify": ["log", "RUN", "--verify"],
    "diff": ["diff", "RUN", "--json"],
    "diff --to": ["diff", "RUN", "--to", "1", "--json"],
    "replay": ["replay", "RUN", "--save", "OUT"],
    "replay --to": ["replay", "RUN", "--to", "1", "--save", "OUT"],
    "export": ["export", "RUN", "OUT", "--format", "delta"],
}
WRITERS = {
    "undo --last": ["undo", "RUN", "--last", "1"],
    "undo --to": ["undo", "RUN", "--to", "1"],
    "undo --edit": ["undo", "RUN", "--edit", "CASE"],
    "resume": [*EDIT, "--limit", "6", "--run-dir", "RUN", "--resume"],
}
COMMANDS = {**READERS, **WRITERS}


class TooLong(BaseException):
    """A command waits for something."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Run:
    """A folder that holds a run, and beside it what a command makes."""

    folder: Path
    out: Path
    case: str

    def copied(self, place: Path) -> Run:
        place.mkdir()
        shutil.copytree(self.folder, place / "run")
        return Run(place / "run", place / "out", self.case)

    def command(self, name: str) -> Result:
        words = {"RUN": str(self.folder), "OUT": str(self.out), "CASE": self.case}
        shutil.rmtree(self.out, ignore_errors=True)
        with within(SECONDS):
            return CliRunner().invoke(app, [words.get(word, word) for word in COMMANDS[name]])

    def made(self, name: str, done: Result) -> object:
        """What a command that succeeded made: numbers, files, or the weights that the run now holds."""
        if name.startswith("log"):
            return re.findall(r"in force .*", done.stdout)
        if name.startswith("diff"):
            return json.loads(done.stdout)
        if name in WRITERS:
            assert self.command("replay").exit_code == 0
        (file,) = self.out.glob("*.safetensors")
        return tensors_hash(load_file(file))


def entries(folder: Path) -> dict[str, object]:
    """All that is in a folder: names, kinds, bytes."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        found[str(path.relative_to(folder))] = path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
    return found


def swapped(path: Path) -> None:
    """Two records, or two lines of a file."""
    if path.suffix == ".safetensors":
        other = path.with_name(f"{(int(path.stem) + 1) % 4:06d}.safetensors")
        data = other.read_bytes()
        other.write_bytes(path.read_bytes())
        path.write_bytes(data)
        return
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[1:2], *lines[:1], *lines[2:]]))


def doubled(path: Path) -> None:
    """A line, or a record under the next number."""
    if path.suffix == ".safetensors":
        shutil.copyfile(path, path.with_name(f"{len(list(path.parent.glob('*.safetensors'))):06d}.safetensors"))
        return
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[-1]]) if lines else b"\n\n")


def flipped(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def moved_behind_a_link(path: Path) -> None:
    target = path.parent.parent / f"moved-{path.name}"
    path.rename(target)
    path.symlink_to(target)


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "flipped early": lambda path: flipped(path, 0.02),
    "flipped in the middle": lambda path: flipped(path, 0.5),
    "flipped late": lambda path: flipped(path, 0.98),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\n{}\n[]\nnull\n"),
    "swapped": swapped,
    "doubled": doubled,
    "folder": lambda path: replaced(path, lambda at: at.mkdir()),
    "link": moved_behind_a_link,
    "dangling link": lambda path: replaced(path, lambda at: at.symlink_to(at.parent / "nowhere")),
    "link to itself": lambda path: replaced(path, lambda at: at.symlink_to(at)),
    "pipe": lambda path: replaced(path, os.mkfifo),
}
# Run, stream, the three batches, outcome.
FILES = (LOG, HEAD, LOCK, *(f"{number:06d}.safetensors" for number in range(6)))
COMBINATIONS = list(itertools.product(FILES, DAMAGES, COMMANDS))


@pytest.fixture
def good(tmp_path: Path) -> Run:
    """A run of three batches of two edits."""
    run = Run(tmp_path / "good" / "run", tmp_path / "good" / "out", "")
    done = CliRunner().invoke(app, [*EDIT, "--limit", "6", "--run-dir", str(run.folder)])
    assert done.exit_code == 0, done.output
    records = RunLog(run.folder).records
    assert [record.kind for record in records] == ["run", "stream", *N_BATCHES * ["batch"], "outcome"]
    run.case = str(records[3].body["edits"][0]["case_id"])
    return run


def check(combination: tuple[str, str, str], run: Run, wanted: dict[str, object]) -> None:
    """Damage a copy of the run, run the command, and judge."""
    name, damage, command = combination
    DAMAGES[damage](run.folder / name)
    before = entries(run.folder)

    done = run.command(command)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output

    if command in READERS:
        assert entries(run.folder) == before
    if done.exit_code == 0:
        assert run.made(command, done) == wanted[command]
        return
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.output
    assert str(run.folder) in errors[0], errors


def campaign(combinations: list[tuple[str, str, str]], good: Run, tmp_path: Path) -> int:
    """Run them all; the number of those that ended in an error."""
    wanted: dict[str, object] = {}
    for number, command in enumerate(COMMANDS):
        run = good.copied(tmp_path / f"wanted-{number}")
        done = run.command(command)
        assert done.exit_code == 0, done.output
        wanted[command] = run.made(command, done)
    assert wanted["undo --to"] == wanted["replay --to"] != wanted["replay"] == wanted["resume"]

    wrong = {}
    for number, combination in enumerate(combinations):
        run = good.copied(tmp_path / str(number))
        try:
            check(combination, run, wanted)
        except (AssertionError, TooLong, OSError, ValueError) as error:
            wrong[combination] = f"{type(error).__name__}: {str(error)[:300]}"
        shutil.rmtree(tmp_path / str(number), ignore_errors=True)
    assert not wrong, "\n".join(f"{combination}: {why}" for combination, why in wrong.items())
    return len(combinations)


def test_some_damage_under_some_commands(good: Run, tmp_path: Path) -> None:
    campaign(random.Random(0).sample(COMBINATIONS, 12), good, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_damage_under_every_command(name: str, good: Run, tmp_path: Path) -> None:
    campaign([each for each in COMBINATIONS if each[0] == name], good, tmp_path)
