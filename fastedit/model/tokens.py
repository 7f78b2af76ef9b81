"""Tokenisation: from texts to token ids, with the positions that an edit or a score reads.

A text is always tokenised whole, and positions come from character offsets. Token lists are never joined, because a
tokenizer may merge or split characters differently where two texts meet.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastedit.records.check import beyond
from fastedit.records.edit import Edit, show
from fastedit.records.join import Joined, joined, opening

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenSequence:
    """Token ids that the model reads, and the positions that are read from it.

    ids: up to and including the last scored position; later tokens have no influence
    lookup: position of the lookup token (the subject's last token), -1 if there is none
    scored: positions whose next-token distribution is read; targets: the token expected after each of them
    """

    ids: tuple[int, ...]
    lookup: int
    scored: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()


def encode(tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Token ids and (start, end) character offsets of whole texts, with the special tokens the tokenizer adds."""
    if not texts:
        return [], []

    batch = tokenizer(list(texts), return_offsets_mapping=True, padding=False, truncation=False)

    return batch["input_ids"], batch["offset_mapping"]


def warn_of_tokens_beyond(tokenizer: Any, n_embeddings: int) -> None:
    """Warn of a tokenizer with tokens for which the embedding has no row."""
    n_beyond = len(tokenizer) - n_embeddings

    if n_beyond > 0:
        log.warning(
            "the tokenizer has %d tokens, the model's embedding %d rows: texts with one of the last %d are refused",
            len(tokenizer),
            n_embeddings,
            n_beyond,
        )


def prompt_ids(tokenizer: Any, prompts: Sequence[str], n_embeddings: int | None = None) -> list[list[int]]:
    """Token ids of prompts that the model is to continue.

    Without the spaces at their end, which belong to what follows, and without the special tokens that the tokenizer
    puts behind a text, behind which another text begins.

    n_embeddings: rows of the model's embedding; None = any token may occur
    Raises ValueError for a prompt without a token, or with one that has no row."""
    if not prompts:
        return []

    texts = [opening(prompt) for prompt in prompts]
    batch = tokenizer(texts, return_special_tokens_mask=True, padding=False, truncation=False)
    rows: list[list[int]] = []

    for prompt, ids, special in zip(prompts, batch["input_ids"], batch["special_tokens_mask"], strict=True):
        # A prompt of special tokens only is one that was asked for, such as the beginning-of-text token alone.
        n = max((at for at, added in enumerate(special, 1) if not added), default=len(ids))
        if n == 0:
            raise ValueError(f"a prompt must give at least one token, got none from {prompt!r}")
        if (unknown := beyond(tokenizer, ids[:n], n_embeddings)) is not None:
            raise ValueError(f"the prompt {show(prompt)} {unknown}")
        rows.append(list(ids[:n]))

    return rows


def lookup_position(offsets: Sequence[tuple[int, int]], end: int) -> int:
    """Position of the token that holds character end - 1: the last token that has characters and starts before `end`.

    Raises ValueError if there is none."""
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
    """A sequence whose targets are the tokens from the first to the last one that ends after character prompt_len.

    Raises ValueError if there is no such token, or if the first one begins the text, since nothing predicts it."""
    in_target = [i for i, (start, stop) in enumerate(offsets) if stop > prompt_len and start < stop]
    if not in_target or in_target[0] == 0:
        raise ValueError("the target has no token of its own after the prompt")

    first = in_target[0]
    last = in_target[-1]

    return TokenSequence(
        ids=tuple(ids[:last]),
        lookup=lookup,
        scored=tuple(range(first - 1, last)),
        targets=tuple(ids[first : last + 1]),
    )


def target_sequences(
    tokenizer: Any, prompts: Sequence[str], targets: Sequence[str], joins: Sequence[str | None] | None = None
) -> list[TokenSequence]:
    """One scored sequence per (prompt, target) pair.

    joins: what to put between them, see `Edit.join`; default: None for all"""
    between = [None] * len(prompts) if joins is None else joins
    texts = [joined(*pair) for pair in zip(prompts, targets, between, strict=True)]
    ids, offsets = encode(tokenizer, [text.text for text in texts])

    return [score_sequence(row, spans, text.start) for row, spans, text in zip(ids, offsets, texts, strict=True)]


def whole_sequences(
    tokenizer: Any, prompts: Sequence[str], targets: Sequence[str], joins: Sequence[str | None] | None = None
) -> list[TokenSequence]:
    """As `target_sequences`, but `ids` include the target's last token, so that what follows it can be read too."""
    return [
        replace(sequence, ids=(*sequence.ids, sequence.targets[-1]))
        for sequence in target_sequences(tokenizer, prompts, targets, joins)
    ]


def rewrite_sequences(tokenizer: Any, edits: Sequence[Edit], templates: Sequence[str]) -> list[list[TokenSequence]]:
    """Per edit, one sequence per context template: the template filled with the prompt, and the new target.

    templates: texts with one `{}`, where the prompt goes
    Each sequence has a lookup position and scores the target's tokens."""
    texts: list[Joined] = []
    subject_ends: list[int] = []

    for edit in edits:
        subject_end = edit.subject_span[1]
        for template in templates:
            texts.append(in_template(template, edit))
            subject_ends.append(template.index("{}") + subject_end)

    ids, offsets = encode(tokenizer, [text.text for text in texts])
    sequences = [
        score_sequence(row, spans, text.start, lookup_position(spans, subject_end))
        for row, spans, text, subject_end in zip(ids, offsets, texts, subject_ends, strict=True)
    ]

    n_templates = len(templates)

    return [sequences[i : i + n_templates] for i in range(0, len(sequences), n_templates)]


def in_template(template: str, edit: Edit) -> Joined:
    """An edit's prompt in a template, and its new target.

    How the two are joined depends on the prompt alone where the template ends with it: a quote that a sampled prefix
    leaves open is none of the edit's."""
    before, _, after = template.partition("{}")

    if after:
        return joined(before + edit.prompt + after, edit.target_new, edit.join)

    text = joined(edit.prompt, edit.target_new, edit.join)

    return Joined(before + text.text, len(before) + text.start)


def subject_sequences(tokenizer: Any, edits: Sequence[Edit]) -> list[TokenSequence]:
    """Per edit, "{subject} is a" up to the subject's last token, the position at which the model's drift is measured.

    The whole text is tokenised and then cut, since later tokens have no influence on that position."""
    subjects = [edit.prompt[slice(*edit.subject_span)] for edit in edits]
    ids, offsets = encode(tokenizer, [f"{subject} is a" for subject in subjects])
    sequences: list[TokenSequence] = []

    for row, spans, subject in zip(ids, offsets, subjects, strict=True):
        position = lookup_position(spans, len(subject))
        sequences.append(TokenSequence(tuple(row[: position + 1]), position, (position,)))

    return sequences


def lookup_prefix(sequence: TokenSequence) -> tuple[int, ...]:
    """Token ids up to and including the lookup token, the only ones on which a key depends."""
    return sequence.ids[: sequence.lookup + 1]
