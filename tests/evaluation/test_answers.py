"""Answers and perplexity against the model's own forward."""

from __future__ import annotations

import math

import pytest
import torch

from fastedit.evaluation.answers import Answer, agreement, answer, perplexity
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import EditSet


def slow_answer(model: ModelAdapter, prompt: str, target: str) -> Answer:
    """The definition: one full forward per question."""
    text = f"{prompt} {target}"
    encoded = model.tokenizer(text, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    places = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)]
    with torch.no_grad():
        log_probs = torch.log_softmax(model.model(torch.tensor([ids])).logits[0].double(), dim=-1)
    best = tuple(int(log_probs[i - 1].argmax()) for i in places)
    mean = float(sum(log_probs[i - 1, ids[i]] for i in places) / len(places))
    return Answer(mean, tuple(ids[i] for i in places), best)


def test_answers_equal_full_forwards(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    pairs = [(e.prompt, t) for e in tiny_facts[:30] for t in (e.target_new, e.target_true)]
    found = answer(tiny_model, pairs)
    for (prompt, target), ours in zip(pairs, found, strict=True):
        slow = slow_answer(tiny_model, prompt, target)
        assert ours.log_prob == pytest.approx(slow.log_prob, abs=1e-4)
        assert ours.best == slow.best
        assert ours.targets == slow.targets
    assert 0 < sum(ours.exact for ours in found) < len(found)


def test_large_question_sets_run_in_several_passes(
    tiny_model: ModelAdapter, tiny_facts: EditSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(e.prompt, e.target_true) for e in tiny_facts[:40]]
    whole = answer(tiny_model, pairs)
    monkeypatch.setattr("fastedit.evaluation.answers.ROW_BUDGET", 60)
    monkeypatch.setattr("fastedit.evaluation.answers.LOGIT_ROWS", 3)
    counted: list[int] = []
    parts = answer(tiny_model, pairs, counted.append)
    assert sum(counted) == 40
    assert len(counted) > 3
    assert [a.best for a in parts] == [a.best for a in whole]


def test_perplexity_is_the_models_own(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    text = " ".join(f"{e.prompt} {e.target_true}." for e in tiny_facts[:60])
    ids = tiny_model.tokenizer(text, add_special_tokens=False)["input_ids"][:400]
    window = min(512, tiny_model.max_positions)
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids), window):
            piece = torch.tensor([ids[start : start + window]])
            if piece.shape[1] > 1:
                loss = tiny_model.model(piece, labels=piece).loss
                total += float(loss) * (piece.shape[1] - 1)
                count += piece.shape[1] - 1
    assert perplexity(tiny_model, text, 400, show=False) == pytest.approx(math.exp(total / count), rel=1e-4)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        perplexity(tiny_model, "a", 1, show=False)


def test_an_answer_is_exact_as_a_whole_and_shared_by_tokens() -> None:
    assert (Answer(-1.0, (4, 5, 6), (4, 5, 6)).exact, Answer(-1.0, (4, 5, 6), (4, 5, 6)).share) == (True, 1.0)
    assert (Answer(-1.0, (4, 5, 6), (4, 9, 6)).exact, Answer(-1.0, (4, 5, 6), (4, 9, 6)).share) == (False, 2 / 3)
    with pytest.raises(ValueError, match="zip"):
        agreement((1, 2), (1,))
