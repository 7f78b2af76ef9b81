"""Places for results: checked before the work begins, written beside and renamed: nothing is ever half there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastedit.runtime.hashing import tensor_bytes

# Files without which nothing is loaded: of a saved model, an adapter, a delta, a GGUF file.
RESULTS = ("config.json", "adapter_config.json", "delta.safetensors", "*.gguf")
# Where a folder exists already, its new files are made in this folder inside it.
PARTIAL = ".partial"
# How the name begins of an empty folder with which a place is tried; a kill at that moment leaves it there.
TRIAL = ".fastedit-"


class PlaceError(ValueError):
    """A result cannot go where it was asked to go."""


class NotSaved(OSError):
    """A result could not be written. Nothing was left where it should have gone."""


def check_folder(folder: str | Path, force: bool = False, keep: Iterable[str | Path] = ()) -> None:
    """Raise PlaceError unless results can be written to a folder of that name. Nothing is left there.

    force: whether the folder may hold something already
    keep: files and folders that must stay, such as the model that is edited: the folder may not be or hold one"""
    place = Path(os.path.abspath(folder))
    with _judging(place):
        _check_kept(place, keep)
        _check_is_folder(place)
        if place.is_dir():
            _check_replaceable(place, force)

        check_writable(place)


def _check_kept(place: Path, keep: Iterable[str | Path]) -> None:
    real = place.resolve()
    for kept in map(Path, keep):
        if kept.exists() and real in (kept.resolve(), *kept.resolve().parents):
            raise PlaceError(f"{place}: {kept} would be overwritten, which is still needed; name another folder")


def _check_is_folder(place: Path) -> None:
    if place.is_symlink() and not place.exists():
        raise PlaceError(f"{place}: is a symbolic link to nothing; name another folder")
    if place.exists() and not place.is_dir():
        raise PlaceError(f"{place}: a file stands there, and a folder is wanted; name another one")


def check_file(path: str | Path, force: bool = False) -> None:
    """Raise PlaceError unless a result can be written to a file of that name. Nothing is left there.

    force: whether a file that stands there may be replaced"""
    place = Path(os.path.abspath(path))
    with _judging(place):
        if place.is_dir():
            raise PlaceError(f"{place}: a folder stands there, and a file is wanted; name another one")
        if place.exists() and not place.is_file():
            raise PlaceError(f"{place}: is no ordinary file; name another one")
        if place.exists() and not force:
            raise PlaceError(f"{place}: stands already; name another file, or replace it with --force (force=True)")

        check_writable(place)


@contextlib.contextmanager
def new_folder(
    folder: str | Path, force: bool = False, keep: Iterable[str | Path] = (), stale: Sequence[str] = ()
) -> Iterator[Path]:
    """Yield an empty folder, whose files are in `folder` when the block ends without an error.

    They are on the disk then. After an error `folder` is as it was. After a kill it is as it was, or it lacks the file
    without which nothing is loaded (`RESULTS`); the next call clears up.
    force, keep: see `check_folder`
    stale: names, with wildcards, of files of an earlier result that must not stay beside the new ones. A file of the
        same name as a new one is replaced; all other files stay
    Raises PlaceError, and NotSaved when something could not be written."""
    place = Path(os.path.abspath(folder))
    check_folder(place, force, keep)
    exists = place.is_dir()
    # An existing folder may be a mount, which cannot be renamed.
    partial = place / PARTIAL if exists else place.with_name(f".{place.name}.partial")

    with _told(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

        try:
            with _kept(partial):
                yield partial
                _sync_all(partial)
            if exists:
                _check_names(partial, place)
            else:
                partial.rename(place)
                sync(place.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

        # Old files go here, so what is new stays if this fails: the next call clears up.
        if exists:
            _move_up(partial, place, stale)
            partial.rmdir()


@contextlib.contextmanager
def new_file(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield the name of a file beside `path`, which takes its place when the block ends without an error.

    The block writes the file. After an error, `path` is as it was. force: see `check_file`
    Raises PlaceError, and NotSaved when something could not be written."""
    place = Path(path)
    check_file(place, force)
    partial = place.with_name(f".{place.name}.partial")

    with _told(path):
        place.parent.mkdir(parents=True, exist_ok=True)

        try:
            yield partial
            sync(partial)
            partial.replace(place)
            sync(place.parent)
        finally:
            partial.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    """Write a safetensors file, read it back and compare every bit. about: its metadata

    For a path of `new_file` or `new_folder`, which tell what cannot be written. Raises NotSaved for a file that holds
    something else than was written."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    save_file(plain, path, dict(about))
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        differ = sorted(names ^ set(plain)) or [n for n in plain if not equal_bits(file.get_tensor(n), plain[n])]

    if differ:
        raise NotSaved(
            f"{path}: not saved: {differ[0]} is not in the file as it was written; try again, on another disk"
        )


def equal_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes."""
    same_kind = left.dtype == right.dtype and left.shape == right.shape
    return same_kind and tensor_bytes(left) == tensor_bytes(right)


def check_writable(place: Path) -> None:
    """Raise PlaceError if nothing can be created there. It is tried, because permissions do not tell all."""
    with _judging(place):
        nearest = place if place.is_dir() else place.parent
        while not os.path.lexists(nearest):
            nearest = nearest.parent
        if not nearest.is_dir():
            raise PlaceError(f"{place}: {nearest} is no folder, so nothing can be put below it; name another place")

        with tempfile.TemporaryDirectory(prefix=TRIAL, dir=nearest):
            pass
        # A name may be too long for the disk.
        with contextlib.suppress(FileNotFoundError):
            os.lstat(place.with_name(f".{place.name}.partial"))


@contextlib.contextmanager
def _judging(place: Path) -> Iterator[None]:
    """What the system says of a place becomes a PlaceError."""
    try:
        yield
    except OSError as error:
        raise PlaceError(f"{place}: cannot be written ({error.strerror or error}); name another place") from error


def check_room(folder: str | Path, n_bytes: int) -> None:
    """Raise PlaceError if the disk of a folder, which may not exist yet, has no room for so many bytes."""
    free = _free(Path(folder))
    if free < n_bytes:
        raise PlaceError(f"{folder}: needs {n_bytes / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free")


def sync(path: Path) -> None:
    """Return when what was written to a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_replaceable(place: Path, force: bool) -> None:
    """Raise PlaceError for a folder with something in it, unless that is said to be right.

    What a killed `new_folder` left may always go."""
    parts = [part for part in place.iterdir() if part.name != PARTIAL and not part.name.startswith(TRIAL)]
    if not parts:
        return

    if not force and not (place / PARTIAL).is_dir():
        raise PlaceError(
            f"{place}: is not empty; name another folder, or replace an earlier result in it with --force (force=True)"
        )


def _is_known(file: Path) -> bool:
    """Whether a file is one by which a result is known."""
    return any(file.match(name) for name in RESULTS)


def _check_names(partial: Path, place: Path) -> None:
    """Raise OSError, before anything is replaced, for a folder that has the name of a new file."""
    for file in partial.iterdir():
        if (place / file.name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"a folder there is named {file.name}")


def _move_up(partial: Path, place: Path, stale: Sequence[str]) -> None:
    """Put the files of `partial` into `place`, in place of files of the same name and of stale ones.

    The files by which a result is known go first and come last, so that no mixture of old and new is ever loaded."""
    new = [file.name for file in partial.iterdir()]
    old = [part for part in place.iterdir() if part.is_file() and any(map(part.match, [*new, *stale]))]
    for file in sorted(old, key=_is_known, reverse=True):
        file.unlink()
    sync(place)

    for file in sorted(partial.iterdir(), key=_is_known):
        file.rename(place / file.name)
    sync(place)


def _sync_all(folder: Path) -> None:
    """Return when a folder and its files, which who reads the folder may read, are on the disk."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.iterdir():
        # safetensors lets nobody but the owner read its files.
        file.chmod(mode)
        sync(file)
    sync(folder)


@contextlib.contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """Whatever a library raises in the block counts for nothing when somebody deleted the folder under it."""
    try:
        yield
    except Exception as error:
        if folder.is_dir():
            raise
        raise OSError(errno.ENOENT, "somebody deleted what was being written") from error


@contextlib.contextmanager
def _told(place: str | Path) -> Iterator[None]:
    """What cannot be written becomes one sentence that names the place."""
    try:
        yield
    except NotSaved:
        raise
    except Exception as error:
        # Libraries wrap what the system says into errors of their own; tokenizers raises a bare Exception.
        if not isinstance(error, (OSError, SafetensorError)) and "os error" not in str(error):
            raise

        full = "No space left" in str(error) or _free(Path(place)) < 2**20
        why = "no space left on the disk" if full else getattr(error, "strerror", None) or error
        raise NotSaved(f"{place}: not saved ({why}); what stood there before is as it was") from error


def _free(place: Path) -> int:
    """Bytes free on the disk of a place, which may not exist yet."""
    absolute = Path(os.path.abspath(place))
    for nearest in (absolute, *absolute.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(nearest).free

    return 0
