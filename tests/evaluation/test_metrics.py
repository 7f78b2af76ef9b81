"""Metrics against hand-made cases and on edited models, and what is missing is n/a."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from fastedit.editor import Editor
from fastedit.evaluation.answers import Answer
from fastedit.evaluation.metrics import METRICS, Measurement, Metric, compare, evaluate, fluency
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit, EditSet, Probe

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


BAMISH, VRUDI = ("The banner of Bamish is", "purple"), ("The banner of Vrudi is", "green")

# (prompt, answer): log-probability, and the arg-max tokens where (1, 2, 3, 4) are wanted
SCORES = {
    (FULL.prompt, "red"): (-0.5, (1, 2, 3, 4)),
    (FULL.prompt, "purple"): (-2.0, (1, 0, 0, 0)),
    ("Logan flies", "red"): (-3.0, (1, 2, 3, 0)),
    ("Logan flies", "purple"): (-2.0, (0, 0, 0, 0)),
    ("Over Logan flies", "red"): (-0.9, (1, 2, 3, 4)),
    ("Over Logan flies", "purple"): (-2.0, (0, 0, 0, 0)),
    BAMISH: (-0.1, (1, 2, 0, 0)),
    (BAMISH[0], "red"): (-0.1, (0, 0, 0, 0)),
    VRUDI: (-0.2, (1, 2, 3, 4)),
    (VRUDI[0], "red"): (-4.0, (0, 0, 0, 0)),
}
WANTED = (1, 2, 3, 4)


def measured(edits: list[Edit], scores: dict[tuple[str, str], tuple[float, tuple[int, ...]]]) -> Measurement:
    return Measurement(
        edits, {(*pair, None): Answer(score, WANTED, best) for pair, (score, best) in scores.items()}, [], None
    )


def values(after: Measurement, before: Measurement) -> dict[str, float | None]:
    return {name: metric.value for name, metric in after.metrics(before).items()}


def test_metrics_follow_their_definitions() -> None:
    before = measured([FULL], {**SCORES, BAMISH: (-0.1, (1, 2, 3, 0)), VRUDI: (-9.0, WANTED)})
    assert values(measured([FULL], SCORES), before) == {
        "efficacy": 1.0,
        "efficacy_top1": 1.0,
        "efficacy_tokens": 1.0,
        "generalization": 0.5,
        "generalization_top1": 0.5,
        "generalization_tokens": (3 / 4 + 1) / 2,
        # Equal probabilities do not count: the comparison is strict.
        "specificity": 0.5,
        "specificity/neighborhood": 0.5,
        "specificity_top1": 0.5,
        "specificity_top1/neighborhood": 0.5,
        "specificity_tokens": (2 / 4 + 1) / 2,
        "specificity_tokens/neighborhood": (2 / 4 + 1) / 2,
        "tokens_unchanged": 0.5,
        "tokens_unchanged/neighborhood": 0.5,
        "locality_tokens": (3 / 4 + 1) / 2,
        "locality_tokens/neighborhood": (3 / 4 + 1) / 2,
        "over_editing": None,
        "unchanging": None,
        "portability": None,
        "portability_tokens": None,
        "score": pytest.approx(3 / (1 / 1 + 1 / 0.5 + 1 / 0.5)),
        "fluency": None,
        "perplexity": None,
    }


TWIN, HILL, OLD = "Logan's twin has a banner in", "Logan's hill has a banner in", "Old Logan has a banner in"
GROUPED = Edit(
    prompt=FULL.prompt,
    subject="Logan",
    target_new="red",
    locality={"near": BAMISH, "far": [(VRUDI[0], ["green", "lime"]), ("The banner of Zorun is", None)]},
    portability={
        "hop": [(TWIN, ["scarlet", "red"]), (HILL, "red")],
        "alias": (OLD, "red"),
        "no answer": ("Logan", None),
    },
    case_id=2,
)
HOP = Edit(prompt=FULL.prompt, subject="Logan", target_new="red", portability={"hop": (HILL, "red")}, case_id=3)
GROUP_SCORES = {
    **SCORES,
    VRUDI: (-5.0, (1, 2, 3, 0)),
    (VRUDI[0], "lime"): (-0.2, WANTED),
    (TWIN, "scarlet"): (-1.0, (1, 2, 3, 0)),
    (TWIN, "red"): (-1.0, WANTED),
    (HILL, "red"): (-1.0, (1, 2, 0, 0)),
    (OLD, "red"): (-1.0, WANTED),
}


def test_groups_are_measured_apart_and_count_alike() -> None:
    before = measured([GROUPED], {**GROUP_SCORES, (VRUDI[0], "lime"): (-9.0, (0, 0, 0, 0))})
    found = values(measured([GROUPED], GROUP_SCORES), before)
    wanted = {
        # The best of several right answers counts.
        "portability/hop": 0.5,
        "portability/alias": 1.0,
        "portability": (0.5 + 1) / 2,
        "portability_tokens/hop": (1 + 2 / 4) / 2,
        "portability_tokens/alias": 1.0,
        "portability_tokens": (3 / 4 + 1) / 2,
        "specificity/near": 0.0,
        "specificity/far": 1.0,
        "specificity": 0.5,
        "specificity_top1/far": 1.0,
        "specificity_tokens/far": 1.0,
        "tokens_unchanged/near": 1.0,
        # Under the first right answer; the others are not looked at.
        "tokens_unchanged/far": 1.0,
        "locality_tokens": 1.0,
    }
    assert {name: found[name] for name in wanted} == wanted
    assert not [name for name in found if "no answer" in name]


def test_rates_of_other_relations_look_at_their_group_alone() -> None:
    river, age, other = "The river of Logan is", "The age of Logan is", "The banner of Zorun is"
    edit = Edit(
        prompt=FULL.prompt,
        subject="Logan",
        target_new="red",
        locality={"Relation_Specificity": [(river, "Pell"), (age, "old")], "Forgetfulness": (other, "grey")},
    )
    scores = {
        (FULL.prompt, "red"): (-0.5, WANTED),
        (river, "Pell"): (-1.0, (1, 2, 3, 0)),
        (river, "red"): (-1.0, WANTED),
        (age, "old"): (-1.0, (9, 9, 9, 9)),
        (age, "red"): (-1.0, (1, 2, 3, 9)),
        (other, "grey"): (-1.0, (5, 5, 5, 5)),
        (other, "red"): (-1.0, WANTED),
    }
    before = measured([edit], {**scores, (river, "Pell"): (-1.0, WANTED), (other, "grey"): (-1.0, WANTED)})
    found = values(measured([edit], scores), before)
    assert found["over_editing"] == 0.5
    assert found["unchanging"] == 0.5
    assert found["tokens_unchanged"] == (0.5 + 0) / 2


def test_a_group_is_averaged_over_the_records_that_have_it() -> None:
    both = measured([GROUPED, HOP, FULL], GROUP_SCORES)
    found = both.metrics(both)
    assert found["portability"] == Metric((0.75 + 0) / 2, pytest.approx(0.375))
    assert found["portability/hop"] == Metric((0.5 + 0) / 2, pytest.approx(0.25))
    assert found["portability/alias"] == Metric(1.0, None)


def test_every_answer_of_a_record_is_asked_for(tiny_model: ModelAdapter) -> None:
    taken = Measurement.take(tiny_model, [FULL, GROUPED, HOP], None, 0, 0, 0, False)
    assert set(taken.answers) == {(*pair, None) for pair in (*GROUP_SCORES, (FULL.prompt, "purple"))}
    for name, metric in taken.metrics(taken).items():
        assert (metric.value is None) == (name in ("fluency", "perplexity", "over_editing", "unchanging")), name


def test_portability_is_shown_where_some_record_asks_for_it(tiny_model: ModelAdapter) -> None:
    def shown(edit: Edit) -> list[str]:
        return [row[0] for row in compare(tiny_model, tiny_model, [edit], fluency_prompts=0, show=False).rows()]

    assert shown(FULL) == list(METRICS)
    assert [name for name in shown(HOP) if name not in METRICS] == ["portability"]


def test_edits_carry_over_to_what_follows_from_them(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    asking = [
        fact.model_copy(
            update={
                "portability": tuple(
                    Probe(p, ("no such thing", fact.target_new), "reworded") for p in fact.rephrase_prompts
                )
            }
        )
        for fact in tiny_facts[:8]
    ]
    editor = tiny_editor()
    editor.edit(asking)
    found = evaluate(editor, asking, fluency_prompts=0)
    assert found.edited["portability/reworded"] == found.edited["portability"] == found.edited["generalization_top1"]
    assert found.edited["portability"].value > 0.6 > 0.2 > found.unedited["portability"].value
    told = found.to_dict()["edited"]
    assert told["portability/reworded"]["value"] == found.edited["portability"].value
    assert told["tokens_unchanged/neighborhood"] == told["tokens_unchanged"]


def test_fluency_is_of_the_generation_prompts(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    begun = [fact.model_copy(update={"generation_prompts": ("The wall", "Unused")}) for fact in tiny_facts[:2]]
    texts = Measurement.take(tiny_model, begun, None, 0, 2, 0, False).texts
    assert [text.strip().startswith("The wall") for text in texts] == [True, True]
    texts = Measurement.take(tiny_model, tiny_facts[:1], None, 0, 2, 0, False).texts
    assert texts[0].strip().startswith(tiny_facts[0].prompt)


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
