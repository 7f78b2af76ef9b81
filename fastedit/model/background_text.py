"""Background text, for second moments and common neurons: from a text file, or sampled from the model."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from fastedit.config import MomentConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.model.sampling import sample_background
from fastedit.records.files import read_plain, read_text
from fastedit.runtime.progress import Show, track
from fastedit.runtime.words import grouped

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where background text comes from.

    path: a UTF-8 text file, or None to sample text from the model with `seed`
    """

    path: Path | None = None
    seed: int = 0

    def identity(self) -> str:
        """A description that is the same only for the same tokens; stored beside second moments."""
        if self.path is None:
            return f"sampled from the model, seed {self.seed}"

        return f"text file, sha256 {hashlib.sha256(read_plain(self.path)).hexdigest()}"

    def check(self) -> None:
        """Judge the file without a model. Raises OSError or ValueError for one that cannot be read or holds no text."""
        if self.path is not None:
            _text(self.path)

    def windows(self, model: ModelAdapter, config: MomentConfig, show: Show) -> list[list[int]]:
        """Windows of token ids, config.tokens tokens in all.

        Each has config.window tokens, or model.max_positions if that is less; the last one of a file may be shorter.
        show: see `track`
        Raises ValueError for a file without text, or with far fewer tokens than are wanted; some fewer are a warning.
        """
        window = min(config.window, model.max_positions)

        if self.path is None:
            with track(config.tokens, "sampling text", "tokens", show) as advance:
                return sample_background(model, config.tokens, window, self.seed, advance)

        ids = _read_tokens(model, self.path, config.tokens)
        _check_length(self.path, len(ids), config.tokens, model.d_ff)

        return [ids[i : i + window] for i in range(0, len(ids), window)]


def _read_tokens(model: ModelAdapter, path: Path, n_tokens: int) -> list[int]:
    """The first n_tokens token ids of a text file, or all it has. Raises ValueError if it holds no text."""
    text = _text(path)
    ids: list[int] = []

    # Tokenising paragraph by paragraph keeps memory flat; a tokenizer never merges across a blank line.
    for paragraph in text.split("\n\n"):
        if len(ids) >= n_tokens:
            break
        ids.extend(model.tokenizer(paragraph + "\n\n", add_special_tokens=False, verbose=False)["input_ids"])

    if not ids:
        raise ValueError(f"{path}: no text to compute second moments from")

    return ids[:n_tokens]


def _text(path: Path) -> str:
    """The text of a file. Raises OSError or ValueError as `read_text`, and ValueError for nothing but white space."""
    if path.suffix.lower() == ".npz":
        raise ValueError(
            f"{path}: a .npz of second moments, as MEMIT stores them, is not read; give a text file, from which they"
            " are computed"
        )

    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: no text to compute second moments from")
    return text


def _check_length(path: Path, n_tokens: int, wanted: int, d_ff: int) -> None:
    """Warn of a text with fewer tokens than are wanted; raise ValueError where that cannot be meant."""
    if n_tokens >= wanted:
        return

    told = f"{path}: holds {grouped(n_tokens)} tokens, and {grouped(wanted)} are to be read"
    # A tenth of what was asked for is another file than was meant. It may still do where C has full rank, which takes
    # d_ff tokens: a preset asks for many more than a small model needs.
    if n_tokens < min(wanted / 10, d_ff):
        raise ValueError(
            f"{told}; give a longer text, or ask for fewer tokens (--moment-tokens, or `tokens` in config=)"
        )

    log.warning("%s; all there are will be read", told)
