"""Tokenisation in one place: texts -> token ids with the positions that matter.

A text is always tokenised whole, and positions are found through character offsets; token lists are never joined,
because a tokenizer may merge or split differently at a seam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastedit.records.edit import Edit


@dataclass(frozen=True)
class TokenSequence:
    """Tokens fed to the model and what is read from them.

    ids: the inputs, up to and including the last scored position (nothing after it is ever needed)
    lookup: position of the lookup token (last token of the subject), or -1 when there is none
    scored: positions whose next-token distribution is read; targets: the token expected there
    """

    ids: tuple[int, ...]
    lookup: int
    scored: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()


def join(prompt: str, target: str) -> str:
    """Prompt and target with exactly one space between: the target's leading space belongs to its first token."""
    return f"{prompt.rstrip()} {target.strip()}"


def encode(tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Token ids and character offsets of whole texts, with the special tokens the tokenizer itself adds."""
    if not texts:
        return [], []
    batch = tokenizer(list(texts), return_offsets_mapping=True, padding=False, truncation=False)
    return batch["input_ids"], batch["offset_mapping"]


def lookup_position(offsets: Sequence[tuple[int, int]], end: int) -> int:
    """Index of the token that holds character end - 1: the last real token starting before `end`."""
    position = -1
    for index, (start, stop) in enumerate(offsets):
        if start < stop and start < end:
            position = index
    if position < 0:
        raise ValueError(f"no token starts before character {end}")
    return position


def score_sequence(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], prompt_len: int, lookup: int = -1
) -> TokenSequence:
    """A sequence whose target is every token that ends after character prompt_len.

    Raises ValueError when no token does (a target that tokenises to nothing) or when it is the first token."""
    first = next((i for i, (start, stop) in enumerate(offsets) if stop > prompt_len and start < stop), None)
    if first is None or first == 0:
        raise ValueError("the target has no token of its own after the prompt")
    last = max(i for i, (start, stop) in enumerate(offsets) if stop > prompt_len and start < stop)
    scored = tuple(range(first - 1, last))
    return TokenSequence(tuple(ids[:last]), lookup, scored, tuple(ids[first : last + 1]))


def target_sequences(tokenizer: Any, prompts: Sequence[str], targets: Sequence[str]) -> list[TokenSequence]:
    """One scored sequence per (prompt, target) pair."""
    ids, offsets = encode(tokenizer, [join(p, t) for p, t in zip(prompts, targets, strict=True)])
    return [
        score_sequence(row, spans, len(prompt.rstrip()))
        for row, spans, prompt in zip(ids, offsets, prompts, strict=True)
    ]


def whole_sequences(tokenizer: Any, prompts: Sequence[str], targets: Sequence[str]) -> list[TokenSequence]:
    """As `target_sequences`, but the inputs go on to the target's last token, whose successor is looked at too."""
    return [
        replace(sequence, ids=(*sequence.ids, sequence.targets[-1]))
        for sequence in target_sequences(tokenizer, prompts, targets)
    ]


def rewrite_sequences(tokenizer: Any, edits: Sequence[Edit], templates: Sequence[str]) -> list[list[TokenSequence]]:
    """For every edit one sequence per template: template(prompt) + target, with lookup and scored positions."""
    texts, ends, lengths = [], [], []
    for edit in edits:
        subject_end = edit.subject_span[1]
        for template in templates:
            offset = template.index("{}")
            prompt = template.replace("{}", edit.prompt, 1).rstrip()
            texts.append(join(prompt, edit.target_new))
            ends.append(offset + subject_end)
            lengths.append(len(prompt))
    ids, offsets = encode(tokenizer, texts)
    flat = [
        score_sequence(row, spans, length, lookup_position(spans, end))
        for row, spans, end, length in zip(ids, offsets, ends, lengths, strict=True)
    ]
    width = len(templates)
    return [flat[i : i + width] for i in range(0, len(flat), width)]


def subject_sequences(tokenizer: Any, edits: Sequence[Edit]) -> list[TokenSequence]:
    """ "{subject} is a" up to the subject's last token, the one position where the drift of the model is measured.

    What follows the subject cannot influence that position, so it is cut after tokenising the whole text."""
    ids, offsets = encode(tokenizer, [f"{edit.subject} is a" for edit in edits])
    found = []
    for row, spans, edit in zip(ids, offsets, edits, strict=True):
        position = lookup_position(spans, len(edit.subject))
        found.append(TokenSequence(tuple(row[: position + 1]), position, (position,)))
    return found


def lookup_prefix(sequence: TokenSequence) -> tuple[int, ...]:
    """The tokens up to and including the lookup token: all that a key depends on."""
    return sequence.ids[: sequence.lookup + 1]
