"""Where background text comes from: a text file, or the model itself."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastedit.config import MomentConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.model.sampling import sample_background
from fastedit.runtime.progress import track


@dataclass(frozen=True)
class Source:
    """Where background text comes from: a text file, or the model itself (path None, sampled with `seed`)."""

    path: Path | None = None
    seed: int = 0

    def identity(self) -> str:
        """A text that changes when the tokens would."""
        if self.path is None:
            return f"sampled from the model, seed {self.seed}"
        return f"text file, sha256 {hashlib.sha256(self.path.read_bytes()).hexdigest()}"

    def windows(self, model: ModelAdapter, config: MomentConfig, show: bool | None) -> list[list[int]]:
        """Token windows of config.window tokens (the last of a text file may be shorter), config.tokens in all.

        Raises ValueError for an empty text."""
        window = min(config.window, model.max_positions)
        if self.path is None:
            with track(config.tokens, "sampling text", "tokens", show) as advance:
                found = sample_background(model, config.tokens, window, self.seed, advance)
            return found
        text = self.path.read_text(encoding="utf-8")
        ids: list[int] = []
        # Tokenising in paragraphs keeps memory flat; a tokenizer never merges across a blank line.
        for block in text.split("\n\n"):
            if len(ids) >= config.tokens:
                break
            ids.extend(model.tokenizer(block + "\n\n", add_special_tokens=False)["input_ids"])
        if not text.strip() or not ids:
            raise ValueError(f"{self.path}: no text to compute second moments from")
        ids = ids[: config.tokens]
        return [ids[i : i + window] for i in range(0, len(ids), window)]
