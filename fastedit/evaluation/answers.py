"""What a model answers: targets scored under teacher forcing, and the perplexity of a text.

Both run on packed rows; questions that begin alike share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastedit.model.adapter import ModelAdapter
from fastedit.model.logits import LogitBuffer, score_rows
from fastedit.model.packed_attention import CausalPlan
from fastedit.model.packed_passes import TreePass, group_by_budget
from fastedit.model.tokens import TokenSequence, target_sequences
from fastedit.runtime.progress import track

ROW_BUDGET = 2048
LOGIT_ROWS = 128
PERPLEXITY_WINDOW = 512


@dataclass(frozen=True)
class Answer:
    """How the model scores one target under teacher forcing.

    log_prob: mean log-probability of its tokens; wanted: its tokens; best: the arg-max tokens in their places
    """

    log_prob: float
    wanted: tuple[int, ...]
    best: tuple[int, ...]

    @property
    def exact(self) -> bool:
        """Whether every token is the arg-max."""
        return self.wanted == self.best

    @property
    def share(self) -> float:
        """Share of the tokens that are the arg-max."""
        return agreement(self.wanted, self.best)


def agreement(left: Sequence[int], right: Sequence[int]) -> float:
    """Share of places, of as many, at which two sequences of tokens are equal."""
    return sum(a == b for a, b in zip(left, right, strict=True)) / len(left)


@torch.no_grad()
def answer(
    model: ModelAdapter, pairs: Sequence[tuple[str, str]], progress: Callable[[int], None] | None = None
) -> list[Answer]:
    """Score (prompt, target) pairs under teacher forcing. Pairs that begin alike share their rows."""
    sequences = target_sequences(model.tokenizer, [p for p, _ in pairs], [t for _, t in pairs])
    buffer = LogitBuffer()
    found: list[Answer] = []
    with model.packed():
        for indices in group_by_budget([len(sequence.ids) for sequence in sequences], ROW_BUDGET):
            group = [sequences[i] for i in indices]
            tree = TreePass.start(model, [sequence.ids for sequence in group])
            tail = [path[i] for path, s in zip(tree.tree.paths, group, strict=True) for i in s.scored]
            rows = model.run(
                tree.rows,
                range(model.n_layers),
                tree.plan,
                tree.rotary,
                torch.tensor(tail, device=model.device),
            )
            targets = torch.tensor([token for s in group for token in s.targets], device=model.device)
            found += _answers(model, rows, targets, group, buffer)
            if progress is not None:
                progress(len(group))
    return found


def _answers(
    model: ModelAdapter,
    rows: torch.Tensor,
    targets: torch.Tensor,
    group: list[TokenSequence],
    buffer: LogitBuffer,
) -> list[Answer]:
    normed = model.final_norm(rows)
    log_probs: list[float] = []
    best: list[int] = []
    for start in range(0, len(targets), LOGIT_ROWS):
        part = slice(start, start + LOGIT_ROWS)
        scores = score_rows(normed[part], model.head, targets[part], buffer)
        log_probs += scores.log_prob.tolist()
        best += scores.best.tolist()
    found, start = [], 0
    for sequence in group:
        stop = start + len(sequence.targets)
        tokens = tuple(best[start:stop])
        mean = sum(log_probs[start:stop]) / (stop - start)
        found.append(Answer(mean, sequence.targets, tokens))
        start = stop
    return found


@torch.no_grad()
def perplexity(model: ModelAdapter, text: str, n_tokens: int = 20_000, show: bool | None = None) -> float:
    """exp of the mean negative log-probability of a text's first n_tokens tokens, in windows of 512."""
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:n_tokens]
    window = min(PERPLEXITY_WINDOW, model.max_positions)
    pieces = [ids[i : i + window] for i in range(0, len(ids), window)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise ValueError("perplexity: the text has fewer than two tokens")
    buffer, total, count = LogitBuffer(), 0.0, 0
    with model.packed(), track(len(pieces), "perplexity", "windows", show) as advance:
        for piece in pieces:
            tokens = torch.tensor(piece, device=model.device)
            places = torch.arange(len(piece), device=model.device)
            rows = model.embed(tokens, places)
            rows = model.run(rows, range(model.n_layers), CausalPlan(len(piece)), model.rotary(places))
            normed = model.final_norm(rows)[:-1]
            for start in range(0, len(normed), LOGIT_ROWS):
                part = slice(start, start + LOGIT_ROWS)
                total -= float(score_rows(normed[part], model.head, tokens[1:][part], buffer).log_prob.sum())
            count += len(piece) - 1
            advance(1)
    return math.exp(total / count)
