"""Metrics against the model's own forward, against hand-made cases, and what is missing is n/a."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fastedit.adapter import ModelAdapter
from fastedit.editor import Editor
from fastedit.edits import Edit, EditSet
from fastedit.evaluation import Answer, _Measurement, answer, compare, evaluate, fluency, perplexity

PLAIN = Edit(prompt="The banner of Logan is", subject="Logan", target_new="red", case_id=1)
FULL = Edit(
    prompt="The banner of Logan is",
    subject="Logan",
    target_new="red",
    target_true="purple",
    rephrase_prompts=("Logan flies", "Over Logan flies"),
    locality=(("The banner of Bamish is", "purple"), ("The banner of Vrudi is", "green")),
    case_id=1,
)


def slow_answer(model: ModelAdapter, prompt: str, target: str) -> Answer:
    """The definition: one full forward per question."""
    text = f"{prompt} {target}"
    encoded = model.tokenizer(text, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    wanted = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)]
    with torch.no_grad():
        log_probs = torch.log_softmax(model.model(torch.tensor([ids])).logits[0].double(), dim=-1)
    best = tuple(int(log_probs[i - 1].argmax()) for i in wanted)
    mean = float(sum(log_probs[i - 1, ids[i]] for i in wanted) / len(wanted))
    return Answer(mean, best == tuple(ids[i] for i in wanted), best)


def test_answers_equal_full_forwards(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    pairs = [(e.prompt, t) for e in tiny_facts[:30] for t in (e.target_new, e.target_true)]
    found = answer(tiny_model, pairs)
    for (prompt, target), ours in zip(pairs, found, strict=True):
        slow = slow_answer(tiny_model, prompt, target)
        assert ours.log_prob == pytest.approx(slow.log_prob, abs=1e-4)
        assert ours.best == slow.best
        assert ours.exact == slow.exact
    assert 0 < sum(ours.exact for ours in found) < len(found)


def test_large_question_sets_run_in_several_passes(
    tiny_model: ModelAdapter, tiny_facts: EditSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(e.prompt, e.target_true) for e in tiny_facts[:40]]
    whole = answer(tiny_model, pairs)
    monkeypatch.setattr("fastedit.evaluation.ROW_BUDGET", 60)
    monkeypatch.setattr("fastedit.evaluation.LOGIT_ROWS", 3)
    counted: list[int] = []
    parts = answer(tiny_model, pairs, counted.append)
    assert sum(counted) == 40
    assert len(counted) > 3
    assert [a.best for a in parts] == [a.best for a in whole]


def measurement(scores: dict[tuple[str, str], float], best: dict[tuple[str, str], tuple[int, ...]]) -> _Measurement:
    answers = {pair: Answer(score, score > -1, best.get(pair, (0,))) for pair, score in scores.items()}
    return _Measurement([FULL], answers, [], None)


def test_metrics_follow_their_definitions() -> None:
    scores = {
        (FULL.prompt, "red"): -0.5,
        (FULL.prompt, "purple"): -2.0,
        ("Logan flies", "red"): -3.0,
        ("Logan flies", "purple"): -2.0,
        ("Over Logan flies", "red"): -0.9,
        ("Over Logan flies", "purple"): -2.0,
        ("The banner of Bamish is", "purple"): -0.1,
        ("The banner of Bamish is", "red"): -0.1,
        ("The banner of Vrudi is", "green"): -0.2,
        ("The banner of Vrudi is", "red"): -4.0,
    }
    before = measurement(scores, {("The banner of Bamish is", "purple"): (7,)})
    after = measurement(scores, {})
    found = after.metrics(before)
    values = {name: metric.value for name, metric in found.items()}
    assert values["efficacy"] == 1.0
    assert values["efficacy_top1"] == 1.0
    assert values["generalization"] == 0.5
    assert values["generalization_top1"] == 0.5
    # Equal probabilities do not count: the comparison is strict.
    assert values["specificity"] == 0.5
    assert values["specificity_top1"] == 1.0
    assert values["tokens_unchanged"] == 0.5
    assert values["score"] == pytest.approx(3 / (1 / 1 + 1 / 0.5 + 1 / 0.5))
    assert values["fluency"] is None
    assert values["perplexity"] is None


def test_missing_fields_are_not_available(tiny_model: ModelAdapter) -> None:
    found = compare(tiny_model, tiny_model, [PLAIN], fluency_prompts=0, show=False)
    assert found.edited["efficacy_top1"].value is not None
    for name in ("efficacy", "generalization", "specificity", "score", "tokens_unchanged", "fluency", "perplexity"):
        assert found.edited[name].value is None, name
    assert str(found).count("n/a") == 2 * 9
    assert found.to_dict()["edited"]["efficacy"] == {"value": None, "error": None}


def test_unedited_model_is_measured_on_its_own_weights(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor()
    before = evaluate(editor, tiny_facts[:8], text="the wall is old. " * 30, fluency_prompts=2)
    editor.edit(tiny_facts[:8])
    after = evaluate(editor, tiny_facts[:8], text="the wall is old. " * 30, fluency_prompts=2)
    assert after.unedited == before.unedited == before.edited
    assert after.edited["efficacy_top1"].value > after.unedited["efficacy_top1"].value
    assert after.unedited["tokens_unchanged"].value == 1.0


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


def test_fluency_is_the_entropy_of_ngrams() -> None:
    # Four distinct bigrams: log2(4) = 2 bits; three distinct trigrams: log2(3).
    assert fluency("a b c d e") == pytest.approx(2 / 3 + 2 * math.log2(3) / 3)
    assert fluency("a a a a a") == 0.0
    assert fluency("") == 0.0


def test_standard_error_is_over_records(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    found = compare(tiny_model, tiny_model, tiny_facts[:25], fluency_prompts=0, show=False).edited["efficacy"]
    assert found.value is not None
    expected = math.sqrt(found.value * (1 - found.value) / 24)
    assert found.error == pytest.approx(expected, rel=1e-6)
