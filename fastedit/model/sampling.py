"""Text sampled from the model itself: context templates, background text for second moments, fluency."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastedit.model.adapter import ModelAdapter

# Beginnings of background text, so that samples differ from their first word on.
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
    """One continuation per prompt, `length` tokens in all with the prompt's, as token ids.

    Prompts of equal token count run together, so nothing is padded; an end-of-text token is never sampled. The
    global random state is left as it was. progress is called with the number of tokens made."""
    encoded = [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(i)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for count, members in sorted(by_length.items()):
            if count >= length:
                raise ValueError(f"prompt {prompts[members[0]]!r} has {count} tokens, no room in {length}")
            for start in range(0, len(members), batch_size):
                group = members[start : start + batch_size]
                ids = torch.tensor([encoded[i] for i in group], device=model.device)
                made = model.generate(ids, length - count, top_k)
                for i, row in zip(group, made.tolist(), strict=True):
                    found[i] = row
                if progress is not None:
                    progress(len(group) * (length - count))
    return found


def sample_background(
    model: ModelAdapter,
    n_tokens: int,
    window: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Windows of text of the model's own making, together at least n_tokens, each `window` tokens long."""
    count = -(-n_tokens // window)
    prompts = [OPENERS[i % len(OPENERS)] for i in range(count)]
    return sample_tokens(model, prompts, window, 50, seed, progress=progress)
