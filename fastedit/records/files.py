"""Reading files that a user named: what is no plain file is refused at once, because reading it may never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_plain(path: str | Path) -> bytes:
    """The bytes of a file. Raises OSError for a pipe or a device, such as /dev/zero, and where `open` does."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "is a pipe or a device; write what it gives into a file, and name that", str(path))

    with open(path, "rb") as file:
        return file.read()


# How files begin that are mistaken for text -> what they are.
BEGINNINGS = {
    b"PK\x03\x04": "a zip archive, as .npz and .xlsx files are",
    b"PK\x05\x06": "an empty zip archive",
    b"\x93NUMPY": "a numpy array",
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PAR1": "a Parquet table",
    b"ARROW1": "an Arrow table",
    b"GGUF": "a GGUF model",
    b"%PDF": "a PDF document",
    b"SQLite format 3": "an SQLite data base",
    b"\x89HDF": "an HDF5 file",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}


def not_text(data: bytes) -> str:
    """What bytes are that are no text, such as "a zip archive"; "" where nothing tells that they are none."""
    for beginning, what in BEGINNINGS.items():
        if data.startswith(beginning):
            return what

    # A safetensors file begins with the length of its JSON header.
    is_safetensors = data[8:10] == b'{"' and int.from_bytes(data[:8], "little") < len(data)

    return "a safetensors file" if is_safetensors else ""


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, line ends as "\\n".

    Raises OSError as `read_plain`, ValueError for other bytes, which says what they are."""
    data = read_plain(path)
    if what := not_text(data) or ("no text: it holds zero bytes" if b"\x00" in data else ""):
        raise ValueError(f"{path}: must be UTF-8 text, and is {what}")

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text, got byte 0x{data[error.start]:02x} at {error.start}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
