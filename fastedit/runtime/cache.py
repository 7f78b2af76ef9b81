"""The cache folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastedit.runtime.words import told_by

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The cache folder, which may not exist yet: $FASTEDIT_CACHE if it is set, else ~/.cache/fastedit.

    The environment is read at every call."""
    home = os.path.expanduser("~")
    # A user without a home has no cache: below a device nothing can be read or written, which is told when it is tried.
    home = os.devnull if home == "~" else home
    return Path(os.environ.get("FASTEDIT_CACHE") or Path(home) / ".cache" / "fastedit")


def store_in_cache(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str], required: bool = False) -> None:
    """Write a safetensors file in one atomic step. about: its metadata

    required: raise where it cannot be written; otherwise that is a warning, and the work goes on without the file"""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), partial, dict(about))
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        if required:
            raise OSError(f"{path}: not written ({told_by(error)})") from error
        log.warning(
            "%s: not written (%s); going on without it, and what it would hold is computed again next time;"
            " FASTEDIT_CACHE names another folder for the cache",
            path,
            told_by(error),
        )


def store_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a small file of plain data in one atomic step; where it cannot be written, that is a warning."""
    # Two processes may write it at once.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        log.warning(
            "%s: not written (%s); going on without it; FASTEDIT_CACHE names another folder for the cache",
            path,
            told_by(error),
        )


def load_json(path: Path) -> dict[str, Any] | None:
    """What `store_json` wrote; None where there is no file, and, with a warning, where it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"it holds a {type(data).__name__}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s: cannot be read (%s); it is made again", path, told_by(error))
        return None

    return data
