"""What a model answers: targets scored under teacher forcing, and the perplexity of a text.

Both run on packed rows (:mod:`fastedit.model.packed_passes`). Prompts that begin alike share rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.model.adapter import ModelAdapter
from fastedit.model.logits import LogitBuffer, score_rows
from fastedit.model.packed_attention import CausalPlan
from fastedit.model.packed_passes import TreePass, group_by_budget
from fastedit.model.tokens import TokenSequence, target_sequences
from fastedit.runtime.progress import Show, track

# Tokens of the sequences that run together; shared rows count in each sequence.
ROW_BUDGET = 2048
# Rows whose logits are in memory at once.
LOGIT_ROWS = 128
# Tokens.
PERPLEXITY_WINDOW = 512


@dataclass(frozen=True)
class Answer:
    """How the model scores one target under teacher forcing.

    log_prob: mean log-probability of the target's tokens; targets: these tokens
    best: the arg-max token at each of their positions
    """

    log_prob: float
    targets: tuple[int, ...]
    best: tuple[int, ...]

    @property
    def exact(self) -> bool:
        """Whether every target token is the arg-max."""
        return self.targets == self.best

    @property
    def share(self) -> float:
        """Share of the target tokens that are the arg-max."""
        return agreement(self.targets, self.best)


def agreement(left: Sequence[int], right: Sequence[int]) -> float:
    """Share of the positions at which two token sequences are equal. Raises ValueError if their lengths differ."""
    return sum(a == b for a, b in zip(left, right, strict=True)) / len(left)


@torch.no_grad()
def answer(
    model: ModelAdapter,
    pairs: Sequence[tuple[str, str] | tuple[str, str, str | None]],
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Score (prompt, target) pairs under teacher forcing, one `Answer` per pair, in order.

    pairs: a third member is what to put between prompt and target, see `Edit.join`

    progress: called with the number of pairs finished since the last call"""
    joins = [pair[2] if len(pair) == 3 else None for pair in pairs]
    sequences = target_sequences(model.tokenizer, [pair[0] for pair in pairs], [pair[1] for pair in pairs], joins)
    sizes = [len(sequence.ids) for sequence in sequences]
    buffer = LogitBuffer()
    answers: list[Answer] = []

    with model.packed():
        for indices in group_by_budget(sizes, ROW_BUDGET):
            group = [sequences[i] for i in indices]
            log_probs, best = _score_targets(model, group, _final_rows(model, group), buffer)
            answers += _answers(group, log_probs, best)

            if progress is not None:
                progress(len(group))

    return answers


def _final_rows(model: ModelAdapter, sequences: Sequence[TokenSequence]) -> Tensor:
    """What the head reads at all scored positions, sequence by sequence, (n_scored, d_head)."""
    tree_pass = TreePass.start(model, [sequence.ids for sequence in sequences])
    paths = tree_pass.tree.paths
    scored = [path[i] for path, sequence in zip(paths, sequences, strict=True) for i in sequence.scored]
    tail = torch.tensor(scored, device=model.device)

    return model.final_norm(
        model.run(tree_pass.rows, range(model.n_layers), tree_pass.plan, tree_pass.rotary, tail=tail)
    )


def _score_targets(
    model: ModelAdapter, sequences: Sequence[TokenSequence], rows: Tensor, buffer: LogitBuffer
) -> tuple[list[float], list[int]]:
    """Per row (n_scored, d_head), the log-probability of its target and the arg-max token."""
    targets = torch.tensor([token for sequence in sequences for token in sequence.targets], device=model.device)
    log_probs: list[float] = []
    best: list[int] = []

    for start in range(0, len(targets), LOGIT_ROWS):
        part = slice(start, start + LOGIT_ROWS)
        scores = score_rows(rows[part], model.head, targets[part], buffer)
        log_probs += scores.log_prob.tolist()
        best += scores.best.tolist()

    return log_probs, best


def _answers(sequences: Sequence[TokenSequence], log_probs: Sequence[float], best: Sequence[int]) -> list[Answer]:
    """Cut the scores of all target tokens into one answer per sequence."""
    answers: list[Answer] = []
    start = 0

    for sequence in sequences:
        stop = start + len(sequence.targets)
        mean = sum(log_probs[start:stop]) / (stop - start)
        answers.append(Answer(mean, sequence.targets, tuple(best[start:stop])))
        start = stop

    return answers


@torch.no_grad()
def perplexity(model: ModelAdapter, text: str, n_tokens: int = 20_000, show: Show = None) -> float:
    """exp of the mean negative log-probability of the tokens of a text, given those before them in their window.

    n_tokens: tokens of the text that are read; show: see `track`
    Windows have 512 tokens, or fewer if the model has fewer positions. The first token of each is not scored.
    Raises ValueError if the text has fewer than two tokens."""
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:n_tokens]
    length = min(PERPLEXITY_WINDOW, model.max_positions)
    windows = [ids[i : i + length] for i in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ValueError("perplexity: the text has fewer than two tokens")

    buffer = LogitBuffer()
    total = 0.0
    with model.packed(), track(len(windows), "perplexity", "windows", show) as advance:
        for window in windows:
            # One after the other: another order of additions would round differently.
            for log_prob in _window_log_probs(model, window, buffer):
                total -= log_prob

            advance(1)

    return math.exp(total / sum(len(window) - 1 for window in windows))


def _window_log_probs(model: ModelAdapter, window: Sequence[int], buffer: LogitBuffer) -> Iterator[float]:
    """Log-probabilities of the window's tokens but the first, summed over every LOGIT_ROWS tokens."""
    tokens = torch.tensor(window, device=model.device)
    positions = torch.arange(len(window), device=model.device)

    rows = model.embed(tokens, positions)
    rows = model.run(rows, range(model.n_layers), CausalPlan(len(window)), model.rotary(positions))
    rows = model.final_norm(rows)[:-1]

    for start in range(0, len(rows), LOGIT_ROWS):
        part = slice(start, start + LOGIT_ROWS)
        yield float(score_rows(rows[part], model.head, tokens[1:][part], buffer).log_prob.sum())
