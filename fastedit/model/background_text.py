"""Background text, for second moments and common neurons: from a text file, or sampled from the model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastedit.config import MomentConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.model.sampling import sample_background
from fastedit.records.files import read_plain, read_text
from fastedit.runtime.progress import track


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

    def windows(self, model: ModelAdapter, config: MomentConfig, show: bool | None) -> list[list[int]]:
        """Windows of token ids, config.tokens tokens in all.

        Each has config.window tokens, or model.max_positions if that is less; the last one of a file may be shorter.
        show: see `track`
        Raises ValueError for a file without text."""
        window = min(config.window, model.max_positions)

        if self.path is None:
            with track(config.tokens, "sampling text", "tokens", show) as advance:
                return sample_background(model, config.tokens, window, self.seed, advance)

        ids = _read_tokens(model, self.path, config.tokens)

        return [ids[i : i + window] for i in range(0, len(ids), window)]


def _read_tokens(model: ModelAdapter, path: Path, n_tokens: int) -> list[int]:
    """The first n_tokens token ids of a text file. Raises ValueError if it holds no text."""
    text = read_text(path)
    ids: list[int] = []

    # Tokenising paragraph by paragraph keeps memory flat; a tokenizer never merges across a blank line.
    for paragraph in text.split("\n\n"):
        if len(ids) >= n_tokens:
            break
        ids.extend(model.tokenizer(paragraph + "\n\n", add_special_tokens=False)["input_ids"])

    if not text.strip() or not ids:
        raise ValueError(f"{path}: no text to compute second moments from")

    return ids[:n_tokens]
