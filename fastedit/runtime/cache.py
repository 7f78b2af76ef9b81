"""The cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder, which may not exist yet: $FASTEDIT_CACHE if it is set, else ~/.cache/fastedit.

    The environment is read at every call."""
    return Path(os.environ.get("FASTEDIT_CACHE") or Path.home() / ".cache" / "fastedit")
