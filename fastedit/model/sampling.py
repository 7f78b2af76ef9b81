"""Text sampled from the model, for context templates, background text, and fluency."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastedit.model.adapter import ModelAdapter
from fastedit.model.tokens import prompt_ids

# First words of background text, so that samples differ from the start.
OPENERS = (
    "The", "In", "A", "It", "This", "When", "For", "He", "She", "They", "We", "You", "I", "As", "At", "But", "One",
    "There", "After", "With", "From", "During", "However", "Many", "What", "If", "On", "His", "Its", "New", "Although",
    "Because",
)  # fmt: skip


def sample_tokens(
    model: ModelAdapter,
    prompts: Sequence[str],
    length: int,
    top_k: int,
    seed: int,
    batch_size: int = 128,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt up to `length` tokens, the prompt's included; returns one list of token ids per prompt.

    top_k: one of the top_k next tokens is drawn by its probability; 1 is greedy. End-of-text is never drawn
    seed: of the draws; the global random state stays as it is
    batch_size: prompts run together. They have the same number of tokens, so that nothing is padded
    progress: called with the number of tokens generated since the last call
    Raises ValueError for a prompt that has `length` tokens or more."""
    encoded = prompt_ids(model.tokenizer, prompts, model.n_embeddings)
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(i)

    samples: list[list[int]] = [[] for _ in prompts]
    # One of its own, with the samples of `torch.manual_seed(seed)`: other threads draw from the global one.
    generator = torch.Generator(model.head.weight.device).manual_seed(seed)

    with torch.no_grad():
        for n_prompt, members in sorted(by_length.items()):
            if n_prompt >= length:
                raise ValueError(f"prompt {prompts[members[0]]!r} has {n_prompt} tokens, no room in {length}")

            for start in range(0, len(members), batch_size):
                group = members[start : start + batch_size]
                token_ids = torch.tensor([encoded[i] for i in group], device=model.device)
                continued = model.generate(token_ids, length - n_prompt, top_k, generator)

                for i, row in zip(group, continued.tolist(), strict=True):
                    samples[i] = row
                if progress is not None:
                    progress(len(group) * (length - n_prompt))

    return samples


def sample_background(
    model: ModelAdapter,
    n_tokens: int,
    window: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Sample background text: windows of `window` token ids each, together at least n_tokens.

    seed, progress: as for `sample_tokens`"""
    n_windows = -(-n_tokens // window)
    prompts = [OPENERS[i % len(OPENERS)] for i in range(n_windows)]

    return sample_tokens(model, prompts, window, 50, seed, progress=progress)
