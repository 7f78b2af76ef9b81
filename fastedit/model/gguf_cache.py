"""GGUF files that were read once, kept in the cache as ordinary checkpoints in float32.

Reading a GGUF file takes long: its weights are unpacked in Python, and so is its vocabulary. What was made of it is
kept under a hash of the content and of the releases that read it. The folder that was used longest ago goes first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from fastedit.runtime.cache import cache_folder
from fastedit.runtime.places import NotSaved, PlaceError, check_room, new_folder

log = logging.getLogger(__name__)

FORMAT = "1"
ABOUT = "about.json"
# Of all kept models together.
MOST_BYTES = 20 * 10**9
CHUNK = 1 << 24


def kept_folder(file: Path) -> Path:
    """The folder in the cache that a GGUF file is kept in, which may not exist."""
    releases = (FORMAT, version("transformers"), version("gguf"))
    digest = hashlib.sha256("\n".join((_digest(file), *releases)).encode())

    return cache_folder() / "gguf" / digest.hexdigest()[:32]


def is_whole(folder: Path) -> bool:
    """Whether a folder holds what was kept in it, bit for bit. A damaged one is told and removed."""
    about = folder / ABOUT
    if not about.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        return False

    try:
        digests = json.loads(about.read_text(encoding="utf-8"))["files"]
        wrong = [name for name, digest in digests.items() if _digest(folder / name) != digest]
        os.utime(about)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        wrong = [f"{ABOUT} ({error})"]

    if wrong:
        log.warning("%s: %s is not as it was written; the GGUF file is read again", folder, wrong[0])
        shutil.rmtree(folder, ignore_errors=True)
    return not wrong


def keep(file: Path, folder: Path, n_bytes: int, write: Callable[[Path], None]) -> None:
    """Keep what was made of a GGUF file, if it fits. It is a warning if it cannot be written, and the work goes on.

    n_bytes: about how large it is; write: writes it into a folder"""
    if n_bytes > MOST_BYTES:
        return

    try:
        _make_room(folder.parent, n_bytes)
        check_room(folder, n_bytes)
        with new_folder(folder) as place:
            write(place)
            digests = {path.name: _digest(path) for path in sorted(place.iterdir())}
            about = {"source": str(file.resolve()), "files": digests}
            (place / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    except (NotSaved, PlaceError, OSError) as error:
        log.warning("%s: not kept in the cache, so it is read as slowly the next time (%s)", file, error)


def _make_room(parent: Path, n_bytes: int) -> None:
    """Remove the models that were used longest ago, until so many bytes more are within the bound."""
    abouts = sorted(parent.glob(f"*/{ABOUT}"), key=lambda about: about.stat().st_mtime)
    sizes = [sum(path.stat().st_size for path in about.parent.iterdir()) for about in abouts]

    for about, size in zip(abouts, sizes, strict=True):
        if sum(sizes) + n_bytes <= MOST_BYTES:
            return
        shutil.rmtree(about.parent, ignore_errors=True)
        sizes = sizes[1:]
        log.info("%s: removed to make room, %d bytes", about.parent, size)


def _digest(file: Path) -> str:
    """BLAKE2 over a file's bytes, hexadecimal."""
    digest = hashlib.blake2b(digest_size=32)
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)

    return digest.hexdigest()
