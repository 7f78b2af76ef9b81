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


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, line ends as "\\n". Raises OSError as `read_plain`, ValueError for other bytes."""
    data = read_plain(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text, got byte 0x{data[error.start]:02x} at {error.start}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
