"""The folder in which fastedit keeps what it computes once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where fastedit keeps what it computes once: $FASTEDIT_CACHE, else ~/.cache/fastedit."""
    return Path(os.environ.get("FASTEDIT_CACHE") or Path.home() / ".cache" / "fastedit")
