"""A run on disk: an append-only log of records that a crash at any instant cannot tear.

    log.jsonl            a line per record: its body, the SHA-256 of its file, a hash chained over all lines before
    000012.safetensors   record 12: its tensors, and in the metadata its body and the chain before it
    lock                 held by the one process that writes

A record is written to a file of another name, synced, renamed, the folder synced: from here on it is committed. Then
its line is appended and synced. A file without its line is taken up again when the run is next opened, so a log that
was cut short, or lost, is rebuilt from the files. Any other difference is damage, and is named. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastedit.runtime.hashing import canonical, tensors_hash

log = logging.getLogger(__name__)

FORMAT = "fastedit run 1"
LOG = "log.jsonl"


class RunError(ValueError):
    """A run directory that cannot be used as asked."""


class DamagedRun(RunError):
    """A file of a run that is missing or holds other bytes than were written; the message names it."""


class LockedRun(RunError):
    """Another process, or another editor of this one, is writing to the run."""


class RunWriteError(OSError):
    """A record could not be written: no space, no permission. Nothing of it is left; earlier records are safe."""


@dataclass(frozen=True)
class Record:
    """One record. body: what its line says; chain: hash over this and all earlier lines; size: bytes of its file."""

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
    """The records of one run directory. `RunLog(folder)` reads; only inside `writing()` can a record be appended.

    Raises RunError for a folder that holds no run, DamagedRun for lines that are not what was written."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.records: list[Record] = []
        self._size = 0
        self._is_writing = self._opened = False
        self.reload()
        if not is_run(self.folder):
            raise RunError(f"{self.folder}: holds no run")

    @classmethod
    def create(cls, folder: str | Path) -> RunLog:
        """A new run with no record in `folder`, which is made; it must be empty or absent. Raises RunError if not."""
        made = cls.__new__(cls)
        made.folder, made.records, made._size, made._is_writing, made._opened = Path(folder), [], 0, False, True
        check_new(folder)
        # A process that was killed before its first record was committed leaves no more than these behind.
        left = {"lock", made.path(0).with_suffix(".partial").name}
        if made.folder.is_dir() and any(entry.name not in left for entry in made.folder.iterdir()):
            raise RunError(f"{folder}: must be empty or absent, and holds other files")
        made.folder.mkdir(parents=True, exist_ok=True)
        return made

    @property
    def chain(self) -> str:
        """Hash over all records."""
        return self.records[-1].chain if self.records else ""

    def path(self, number: int) -> Path:
        """The file of a record."""
        return self.folder / f"{number:06d}.safetensors"

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run's lock. What a crash left behind is mended first, with a warning.

        Raises LockedRun when it is held elsewhere; RunError when others have written since this object last read."""
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise LockedRun(f"{self.folder}: another process is writing to this run") from None
        try:
            known = self.chain
            self.reload()
            self._mend()
            # What others wrote, or this process could not take back, is not in the weights of who holds this object.
            if self._opened and self.chain != known:
                raise RunError(f"{self.folder}: holds records that were not written from here; open it again")
            self._opened = self._is_writing = True
            yield
        finally:
            self._is_writing = False
            lock.release()

    def append(self, kind: str, body: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Record:
        """Commit a record; when this returns it is on the disk. Raises RunWriteError, and then it never was."""
        if not self._is_writing:
            raise RunError(f"{self.folder}: a record can be appended inside `writing()` only")
        number, held = len(self.records), dict(tensors or {})
        about = {"record": number, "kind": kind, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **body}
        text = canonical({**about, "tensors_sha256": tensors_hash(held)})
        payload = save(held, {"format": FORMAT, "body": text, "previous": self.chain})
        record = _record(number, text, self.chain, payload)
        path = self.path(number)
        try:
            _write_synced(path.with_suffix(".partial"), payload)
            path.with_suffix(".partial").replace(path)
            _sync_folder(self.folder)
            self._append_line(record)
        except OSError as error:
            self._take_back(path)
            raise RunWriteError(
                error.errno, f"{path}: not written ({error.strerror or error}); the run stands"
            ) from error
        self.records.append(record)
        return record

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The tensors of a record, read now and checked. Raises DamagedRun."""
        record, path = self.records[number], self.path(number)
        payload = _read(path)
        if hashlib.sha256(payload).hexdigest() != record.file_sha256:
            raise DamagedRun(f"{path}: its bytes are not those that were written (checksum differs)")
        # Copied: a tensor inside a larger buffer need not be aligned as torch aligns its own, and BLAS may then differ.
        return {name: tensor.clone() for name, tensor in load(payload).items()}

    def verify(self) -> None:
        """Check every byte of every record. Raises DamagedRun naming the first that differs."""
        for record in self.records:
            self.tensors(record.number)

    def reload(self) -> None:
        """Read the log anew; a torn last line is left out. Raises DamagedRun."""
        path = self.folder / LOG
        data = _read(path) if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]
        self.records, self._size = [], 0
        for raw in (line + b"\n" for line in whole.split(b"\n")[:-1]):
            # A block that never reached the disk reads as zeros.
            if b"\0" in raw and self._size + len(raw) == len(whole):
                break
            self.records.append(self._parsed(raw))
            self._size += len(raw)

    def _parsed(self, raw: bytes) -> Record:
        where = f"{self.folder / LOG} line {len(self.records) + 1}"
        hint = "the log is rebuilt from the record files when it is deleted"
        try:
            data = json.loads(raw)
            body, file_sha256, chain = data["body"], data["file_sha256"], data["chain"]
            record = Record(body["record"], body["kind"], body, file_sha256, chain)
            sound = record.line == raw and record.number == len(self.records)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedRun(f"{where}: is damaged ({error!r}); {hint}") from None
        if not sound or chain != _chain(self.chain, canonical(body), file_sha256):
            raise DamagedRun(f"{where}: is not what was written (checksum differs); {hint}")
        path = self.path(record.number)
        return replace(record, size=path.stat().st_size if path.is_file() else 0)

    def _mend(self) -> None:
        """Cut a torn tail, take up records whose line is missing, remove what was never committed."""
        path = self.folder / LOG
        found = path.stat().st_size if path.is_file() else 0
        if found != self._size:
            log.warning("%s: cut a torn tail of %d bytes", path, found - self._size)
            with open(path, "r+b") as file:
                file.truncate(self._size)
        while self.path(len(self.records)).is_file():
            record = self._from_file(len(self.records))
            self._append_line(record)
            self.records.append(record)
            log.warning("%s: record %d had no line, taken up from its file", path, record.number)
        for partial in self.folder.glob("*.partial"):
            partial.unlink()

    def _from_file(self, number: int) -> Record:
        path = self.path(number)
        payload = _read(path)
        try:
            size = int.from_bytes(payload[:8], "little")
            about = json.loads(payload[8 : 8 + size])["__metadata__"]
            text, previous, held = about["body"], about["previous"], load(payload)
            sound = about["format"] == FORMAT and json.loads(text)["tensors_sha256"] == tensors_hash(held)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DamagedRun(f"{path}: is damaged ({error!r})") from None
        if not sound or previous != self.chain:
            raise DamagedRun(f"{path}: has no line in {LOG} and does not follow record {number - 1}")
        return _record(number, text, previous, payload)

    def _append_line(self, record: Record) -> None:
        path = self.folder / LOG
        is_new = not path.exists()
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            _write_all(handle, record.line)
            os.fsync(handle)
        finally:
            os.close(handle)
        if is_new:
            _sync_folder(self.folder)
        self._size += len(record.line)

    def _take_back(self, path: Path) -> None:
        """After a failed write: no part of the record may come back. What cannot be removed now is mended later."""
        with contextlib.suppress(OSError):
            os.truncate(self.folder / LOG, self._size)
        for left in (path, path.with_suffix(".partial")):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)


def is_run(folder: str | Path) -> bool:
    """Whether the folder holds a run, or what is left of one."""
    return (Path(folder) / LOG).is_file() or (Path(folder) / "000000.safetensors").is_file()


def check_new(folder: str | Path) -> None:
    """Raise RunError where a run was begun already."""
    if is_run(folder):
        raise RunError(f"{folder}: holds a run already; resume it (resume=True, --resume) or name another folder")


def _record(number: int, text: str, previous: str, payload: bytes) -> Record:
    body, digest = json.loads(text), hashlib.sha256(payload).hexdigest()
    return Record(number, body["kind"], body, digest, _chain(previous, text, digest), len(payload))


def _chain(previous: str, text: str, file_sha256: str) -> str:
    return hashlib.sha256(f"{previous}\n{file_sha256}\n{text}".encode()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedRun(f"{path}: cannot be read ({error.strerror})") from error


def _write_synced(path: Path, payload: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write_all(handle, payload)
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, payload: bytes) -> None:
    left = memoryview(payload)
    while left:
        left = left[os.write(handle, left) :]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
