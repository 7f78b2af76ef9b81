"""The run log: the records of a run directory, appended one by one, which a crash at any instant cannot tear.

    log.jsonl            one line per record: its body, the SHA-256 of its file, a hash chained over all lines before
    000012.safetensors   record 12: its tensors, and in the metadata its body, the chain before it, a hash of both
    head.json            how many records were written, and the chain over them; may be older than the log
    lock                 held by the one process that writes

A record is written to a file of another name, synced and renamed, and the folder is synced: now it is committed. Then
its line is appended and synced. A file without its line counts as well, and the next writer adds the line, so a log
that was cut short or lost is rebuilt from the files. Then the head is written, in one step too: records that it counts
and that have neither file nor line are missing. Any other difference is damage, and the error names the file. No file
is a pickle.

Reading takes no lock and writes nothing. A damaged run can be read up to the damage (`up_to_damage`), and a writer can
set aside what is damaged and go on from there (`writing(rescue=True)`).

The body of record 0 holds the format number of the run. It goes up when an older version of fastedit would misread the
directory; a new setting or a new field of an edit needs no new number, see :mod:`fastedit.runs.fields`. The line and
the metadata of record 0 keep their form in every format, so that the number can always be read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastedit.runs.head import HEAD, Head
from fastedit.runtime.hashing import canonical, tensors_hash
from fastedit.runtime.places import sync

log = logging.getLogger(__name__)

# Of new runs, and the newest that can be read. Runs of fastedit 0.1.0 hold no number in their body: they have format 1.
FORMAT = 1
LOG = "log.jsonl"
LOCK = "lock"
# Folder for what a rescue sets aside; a number follows where it exists already.
ASIDE = "damaged"
REPAIR = "restore the file, or take the run back to before it (fastedit undo --to N)"
_RECORD_FILE = re.compile(r"\d{6,}\.safetensors")


class RunError(ValueError):
    """A run directory that cannot be used as asked."""


class DamagedRun(RunError):
    """A file of a run is missing or holds other bytes than were written; the message names it."""


class LockedRun(RunError):
    """Another process, or another editor of this process, is writing to the run."""


class RunWriteError(OSError):
    """A record could not be written: no space, no permission. No part of it stays; earlier records are safe."""


@dataclass(frozen=True)
class Record:
    """One record of a run log.

    body: plain data, as its line holds it
    file_sha256: of its file
    chain: hash over this record and all earlier ones
    size: of its file, in bytes
    """

    number: int
    kind: str
    body: Mapping[str, Any]
    file_sha256: str
    chain: str
    size: int = 0

    @property
    def line(self) -> bytes:
        """Its line in the log."""
        data = {"body": self.body, "file_sha256": self.file_sha256, "chain": self.chain}
        return canonical(data).encode("ascii") + b"\n"


class RunLog:
    """The records of one run directory. `RunLog(folder)` reads; `append` works only inside `writing()`.

    up_to_damage: read the records before the first that cannot be read; `damage` says why
    quiet: warn of nothing that is read, since the run is opened again and told of then
    Raises RunError for a folder without a run or with one of a newer format, DamagedRun for lines that are not what was
    written, and for records that are missing before others."""

    def __init__(self, folder: str | Path, up_to_damage: bool = False, quiet: bool = False) -> None:
        self._start(folder, opened=False, quiet=quiet)
        self.reload()

        if not is_run(self.folder):
            raise RunError(f"{self.folder}: holds no run")
        if self.damage is not None and not up_to_damage:
            raise self.damage

    @classmethod
    def create(cls, folder: str | Path) -> RunLog:
        """A new run log without records. The folder is created. Raises RunError unless it is empty or absent."""
        check_new(folder)
        created = cls.__new__(cls)
        created._start(folder, opened=True)

        # A process that was killed before it committed its first record leaves no more than these behind.
        leftovers = {LOCK, created.path(0).with_suffix(".partial").name}
        if created.folder.is_dir() and any(entry.name not in leftovers for entry in created.folder.iterdir()):
            raise RunError(f"{folder}: must be empty or absent, and holds other files")

        created.folder.mkdir(parents=True, exist_ok=True)
        return created

    def _start(self, folder: str | Path, opened: bool, quiet: bool = False) -> None:
        """opened: whether this object has held the lock, or begins the run; quiet: as above"""
        self.folder = Path(folder)
        self.records: list[Record] = []
        # What is damaged, so that these are not all records, or not all of them have a line.
        self.damage: DamagedRun | None = None
        # Records that have a line, and bytes of the log up to the end of the last one.
        self._n_lines = 0
        self._size = 0
        self._head: Head | None = None
        self._opened = opened
        self._quiet = quiet
        # What was warned of: a run is read again before it is written.
        self._told: set[str] = set()
        self._refused: str | None = None
        self._held: _Held | None = None

    @property
    def format(self) -> int:
        """The format number of the run."""
        return _format(self.records[0].body) if self.records else FORMAT

    @property
    def chain(self) -> str:
        """Hash over all records."""
        return self.records[-1].chain if self.records else ""

    def path(self, number: int) -> Path:
        """The file of a record."""
        return self.folder / f"{number:06d}.safetensors"

    def rely(self) -> None:
        """Weights are made from what was read: refuse to write when others have written since."""
        self._opened = True

    def warn(self, text: str) -> None:
        """Warn of what was read, once."""
        if not self._quiet and text not in self._told:
            log.warning("%s", text)
        self._told.add(text)

    def refuse_writing(self, why: str) -> None:
        """From now on `writing` raises RunError with this message."""
        self._refused = why

    @contextlib.contextmanager
    def writing(self, rescue: bool = False) -> Iterator[None]:
        """Hold the run's lock. What a crash left behind is mended first, with a warning.

        rescue: records after a damaged or missing one are moved into a folder, with a warning, and the run goes on from
            the record before it
        Raises LockedRun when another process or editor holds the lock; DamagedRun; RunError when others have written
        since this object last read, or when a file of the run is no plain file."""
        if self._refused is not None:
            raise RunError(self._refused)
        for name in (LOCK, LOG):
            _check_plain(self.folder / name)

        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise LockedRun(f"{self.folder}: another process is writing to this run") from None

        try:
            known = self.chain
            self.reload()
            was_damaged = self.damage is not None
            if self.damage is not None:
                self._set_aside(rescue)
            self._mend()

            # The weights of the editor that holds this object lack records that others wrote, and records that this
            # process failed to write and could not remove.
            rebuilt = was_damaged and known in ("", *(record.chain for record in self.records))
            if self._opened and self.chain != known and not rebuilt:
                raise RunError(f"{self.folder}: holds records that were not written from here; open it again")

            self._opened = True
            self._held = _Held(_which_file(self.folder / LOCK), self._names())
            yield
        finally:
            self._held = None
            lock.release()

    def append(self, kind: str, body: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Record:
        """Commit a record; when this returns it is on the disk.

        Raises RunWriteError when it could not be written; the run is then as it was. Raises RunError, with nothing
        written, when the lock or a file of the run was deleted or changed by others in the meantime."""
        if self._held is None:
            raise RunError(f"{self.folder}: a record can be appended inside `writing()` only")
        self._check_held(self._held)

        record, payload = self._encode(kind, body, dict(tensors or {}))
        path = self.path(record.number)
        partial = path.with_suffix(".partial")

        try:
            _write_synced(partial, payload)
            partial.replace(path)
            sync(self.folder)
            self._append_line(record)
        except OSError as error:
            self._take_back(path)
            why = error.strerror or error
            raise RunWriteError(error.errno, f"{path}: not written ({why}); the run stands") from error

        self.records.append(record)
        self._n_lines += 1
        self._held.names.update((path.name, LOG))
        self._write_head()
        return record

    def _check_held(self, held: _Held) -> None:
        """Raise RunError when others have touched the folder since the lock was taken."""
        lock = self.folder / LOCK
        if _which_file(lock) != held.lock:
            raise RunError(f"{lock}: was deleted or replaced while this process was writing; open the run again")

        gone = sorted(held.names - self._names())
        if gone:
            raise DamagedRun(f"{self.folder}: {_some(gone)} vanished while this process was writing; restore the files")

        path = self.folder / LOG
        if (path.stat().st_size if path.is_file() else 0) != self._size:
            raise DamagedRun(f"{path}: was changed while this process was writing; open the run again")

    def _encode(self, kind: str, body: Mapping[str, Any], tensors: dict[str, Tensor]) -> tuple[Record, bytes]:
        """The next record, and the bytes of its file."""
        number = len(self.records)
        head: dict[str, Any] = {"record": number, "kind": kind, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        if number == 0:
            head["format"] = FORMAT
            # That a head is written; runs of fastedit 0.1.0 have none.
            head["head"] = True

        text = canonical({**head, **body, "tensors_sha256": tensors_hash(tensors)})
        about = {"format": _format_text(self.format), "body": text, "previous": self.chain}
        # For a file that has lost its line, which holds the other checksum.
        payload = save(tensors, {**about, "sha256": _text_hash(text, self.chain)})
        return _record(number, text, self.chain, payload), payload

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The tensors of a record, read from its file and checked. Raises DamagedRun."""
        record = self.records[number]
        path = self.path(number)

        payload = _read(path)
        if hashlib.sha256(payload).hexdigest() != record.file_sha256:
            raise DamagedRun(f"{path}: its bytes are not those that were written (checksum differs)")

        # Copied: a tensor inside a larger buffer need not be aligned as torch aligns its own, and BLAS may then differ.
        return {name: tensor.clone() for name, tensor in load(payload).items()}

    def damaged(self) -> dict[int, DamagedRun]:
        """Numbers of the records whose files are missing or hold other bytes, and what is wrong with each."""
        wrong = {}
        for record in self.records:
            try:
                self.tensors(record.number)
            except DamagedRun as error:
                wrong[record.number] = error
        return wrong

    def verify(self) -> None:
        """Check every byte of every record. Raises DamagedRun naming the first file that differs."""
        for error in self.damaged().values():
            raise error

    def reload(self) -> None:
        """Read the run anew: the lines of the log without a torn last one, then the files that have no line.

        `damage` says which line is damaged, and why files cannot be read. Raises RunError for a newer format."""
        self.records = []
        self.damage = None
        self._size = self._n_lines = 0
        # First: a writer may add records while they are read.
        self._head = self._read_head()

        for read in (self._read_lines, self._take_up, self._compare_head):
            try:
                read()
            except DamagedRun as error:
                self.damage = error if self.damage is None else DamagedRun(f"{self.damage}; {error}")

    def _read_lines(self) -> None:
        path = self.folder / LOG
        data = _read(path) if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]

        for raw in (line + b"\n" for line in whole.split(b"\n")[:-1]):
            # A block that never reached the disk reads as zeros.
            if b"\0" in raw and self._size + len(raw) == len(whole):
                break

            self.records.append(self._parse(raw))
            self._n_lines += 1
            self._size += len(raw)

    def _take_up(self) -> None:
        """Read the records that have no line. Raises DamagedRun for one that is damaged, or missing before others."""
        while later := self._files_after_lines():
            number = len(self.records)
            path = self.path(number)
            # Of a missing first record, no file may be said to follow anything.
            if not path.is_file():
                raise DamagedRun(
                    f"{path}: is missing, and {LOG} has no line for it; {_some(later)} cannot be read without it and"
                    f" {'is' if len(later) == 1 else 'are'} kept; {REPAIR}"
                )

            try:
                self.records.append(self._from_file(number))
            except DamagedRun as error:
                kept = [name for name in later if name != path.name]
                follows = f"; {_some(kept)} cannot be read without it" if kept else ""
                raise DamagedRun(f"{error}{follows}; {REPAIR}") from None

    def _read_head(self) -> Head | None:
        """What the head file says; None where there is none that can be read."""
        path = self.folder / HEAD
        if not path.is_file():
            return None

        try:
            head = Head.parse(_read(path))
        except DamagedRun:
            head = None
        if head is None:
            self.warn(f"{path}: is damaged, and not used; the next writer writes it anew")
        return head

    def _compare_head(self) -> None:
        """Raise DamagedRun when the head counts records that are missing. Warn where a missing head or log hides it."""
        if self.damage is not None or not self.records:
            return

        head, path, count = self._head, self.folder / HEAD, len(self.records)
        if self._n_lines == 0:
            self.warn(f"{self.folder / LOG}: is lost or empty, read from the record files up to {count - 1:06d}")
        if head is None:
            if self._n_lines == 0 or (self.records[0].body.get("head") and count > 1):
                self.warn(f"{self.folder}: no head counts the records; later ones, if there were any, are lost")
            return

        if head.records > count:
            missing = [self.path(number).name for number in range(count, head.records)]
            raise DamagedRun(
                f"{self.folder}: {_some(missing)} and their lines in {LOG} are missing, {path.name} counts"
                f" {head.records} records; {REPAIR}"
            )
        if self.records[head.records - 1].chain != head.chain:
            raise DamagedRun(f"{path}: counts other records than these; {REPAIR}")

    def _write_head(self) -> None:
        """Say how far the log has come. A failure is a warning: the record is on the disk, and an older head is right
        too."""
        path = self.folder / HEAD
        partial = path.with_suffix(".partial")
        head = Head(len(self.records), self.chain)
        try:
            _write_synced(partial, head.payload)
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            log.warning("%s: not written (%s); that the last record is lost would not be seen", path, error.strerror)
            return
        self._head = head
        self._told.clear()

    def _files_after_lines(self) -> list[str]:
        """Names of the record files after the records read so far, in order."""
        if not self.folder.is_dir():
            return []
        first = self.path(len(self.records)).name
        return sorted(name for name in self._names() if name != LOG and name >= first)

    def _names(self) -> set[str]:
        """Names of the log and of all record files."""
        return {name for name in os.listdir(self.folder) if name == LOG or _RECORD_FILE.fullmatch(name)}

    def _parse(self, raw: bytes) -> Record:
        """The record of a line."""
        where = f"{self.folder / LOG} line {len(self.records) + 1}"
        hint = "the log is rebuilt from the record files when it is deleted"

        try:
            data = json.loads(raw)
            body, file_sha256, chain = data["body"], data["file_sha256"], data["chain"]
            record = Record(body["record"], body["kind"], body, file_sha256, chain)
            is_sound = record.line == raw and record.number == len(self.records)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedRun(f"{where}: is damaged ({error!r}); {hint}") from None

        if not is_sound or chain != _chain(self.chain, canonical(body), file_sha256):
            raise DamagedRun(f"{where}: is not what was written (checksum differs); {hint}")

        _check_format(self.folder, body)
        path = self.path(record.number)
        return replace(record, size=path.stat().st_size if path.is_file() else 0)

    def _mend(self) -> None:
        """Cut a torn tail, add the missing lines of records, remove what was never committed."""
        path = self.folder / LOG
        size = path.stat().st_size if path.is_file() else 0
        if size != self._size:
            log.warning("%s: cut a torn tail of %d bytes", path, size - self._size)
            _truncate(path, self._size)

        for record in self.records[self._n_lines :]:
            self._append_line(record)
            self._n_lines += 1
            log.warning("%s: record %d had no line, taken up from its file", path, record.number)

        for partial in self.folder.glob("*.partial"):
            partial.unlink()

        if self.records and (self._head is None or self._head.records != len(self.records)):
            self._write_head()

    def _set_aside(self, rescue: bool) -> None:
        """Go on before the damage: rebuild a damaged log from the files, move files that cannot be read into a folder.

        Raises the damage unless `rescue`."""
        if self.damage is None or not rescue:
            raise self.damage or RunError(f"{self.folder}: nothing to rescue")

        aside = self._new_aside()
        path = self.folder / LOG
        if path.is_file():
            shutil.copyfile(path, aside / LOG)
            _truncate(path, self._size)

        self.reload()
        moved = self._files_after_lines() if self.damage is not None else []
        if self.damage is not None and (self.folder / HEAD).is_file():
            moved.append(HEAD)
            self._head = None
        for name in reversed(moved):
            (self.folder / name).rename(aside / name)

        self.damage = None
        log.warning("%s: damaged; set aside in %s: %s", self.folder, aside, ", ".join(os.listdir(aside)) or "nothing")

    def _new_aside(self) -> Path:
        taken = sum(1 for entry in self.folder.iterdir() if entry.name.startswith(ASIDE))
        aside = self.folder / (f"{ASIDE}-{taken + 1}" if taken else ASIDE)
        aside.mkdir()
        return aside

    def _from_file(self, number: int) -> Record:
        """A record that has no line."""
        path = self.path(number)
        payload = _read(path)

        try:
            size = int.from_bytes(payload[:8], "little")
            about = json.loads(payload[8 : 8 + size])["__metadata__"]
            text, previous = about["body"], about["previous"]
            body = json.loads(text)
            # Record 0 names the format of the run, the others follow it.
            number_of_format = self.format if number else _format(body)
            is_sound = about["format"] == _format_text(number_of_format)
            is_sound = is_sound and body["tensors_sha256"] == tensors_hash(load(payload))
            # Runs of fastedit 0.1.0 hold three names and no checksum.
            is_older = about.keys() == {"format", "body", "previous"}
            is_sound = is_sound and (is_older or about["sha256"] == _text_hash(text, previous))
            is_sound = is_sound and body["record"] == number
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedRun(f"{path}: is damaged ({error!r})") from None

        if not is_sound or previous != self.chain:
            raise DamagedRun(f"{path}: has no line in {LOG} and does not follow record {number - 1}")

        _check_format(self.folder, body)
        return _record(number, text, previous, payload)

    def _append_line(self, record: Record) -> None:
        path = self.folder / LOG
        is_new = not path.exists()

        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            _write_all(handle, record.line)
            os.fsync(handle)
        finally:
            os.close(handle)

        if is_new:
            sync(self.folder)
        self._size += len(record.line)

    def _take_back(self, path: Path) -> None:
        """After a failed write, remove every part of the record. What cannot be removed now is mended later."""
        with contextlib.suppress(OSError):
            _truncate(self.folder / LOG, self._size)

        for part in (path, path.with_suffix(".partial")):
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Held:
    """What a writer found when it took the lock.

    lock: which file the lock is; names: of the run's files, and of those written since
    """

    lock: tuple[int, int] | None
    names: set[str]


def is_run(folder: str | Path) -> bool:
    """Whether the folder holds a run, or what is left of one."""
    place = Path(folder)
    if not place.is_dir():
        return False
    return (place / LOG).is_file() or any(_RECORD_FILE.fullmatch(name) for name in os.listdir(place))


def check_new(folder: str | Path) -> None:
    """Raise RunError when the folder holds a run already."""
    if is_run(folder):
        raise RunError(f"{folder}: holds a run already; resume it (resume=True, --resume) or name another folder")


def _format(body: Mapping[str, Any]) -> Any:
    """The format number in the body of record 0."""
    return body.get("format", 1)


def _format_text(number: int) -> str:
    """The format in a file's metadata."""
    return f"fastedit run {number}"


def _check_format(folder: Path, body: Mapping[str, Any]) -> None:
    number = _format(body)
    if number not in range(1, FORMAT + 1):
        raise RunError(
            f"{folder}: the run has format {number}, and this version of fastedit reads formats up to {FORMAT};"
            " a newer version wrote it"
        )


def _record(number: int, text: str, previous: str, payload: bytes) -> Record:
    body = json.loads(text)
    digest = hashlib.sha256(payload).hexdigest()
    return Record(number, body["kind"], body, digest, _chain(previous, text, digest), len(payload))


def _text_hash(text: str, previous: str) -> str:
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def _chain(previous: str, text: str, file_sha256: str) -> str:
    return hashlib.sha256(f"{previous}\n{file_sha256}\n{text}".encode()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        # A pipe would be waited for.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise DamagedRun(f"{path}: cannot be read (no plain file)")
            return file.read()
    except OSError as error:
        raise DamagedRun(f"{path}: cannot be read ({error.strerror})") from error


def _check_plain(path: Path) -> None:
    """Raise RunError for a link, pipe or device in place of a file: writing would change or wait for another file."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return

    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no plain file"
        raise RunError(f"{path}: is {kind}, and nothing is written through it; put the file itself there")


def _which_file(path: Path) -> tuple[int, int] | None:
    """Device and number of a file, None where there is none."""
    try:
        about = path.lstat()
    except OSError:
        return None
    return about.st_dev, about.st_ino


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... {names[-1]}" if len(names) > 3 else "")


def _truncate(path: Path, size: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.ftruncate(handle, size)
    finally:
        os.close(handle)


def _write_synced(path: Path, payload: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    try:
        _write_all(handle, payload)
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, payload: bytes) -> None:
    rest = memoryview(payload)
    while rest:
        rest = rest[os.write(handle, rest) :]
