"""The six numbers: an unedited model has locality 100, and case and full stops do not matter."""

from __future__ import annotations

import copy

import pytest
from tokenizers import processors

from fastedit.methods.meg import MeG
from fastedit.methods.meg.metrics import ask_base, forced_sequences, harmonic_mean, measure, questions, same_answer
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit, EditSet


@pytest.fixture
def beginning_model(tiny_model: ModelAdapter) -> ModelAdapter:
    """A model whose tokenizer puts a beginning-of-text token in front of every text."""
    tokenizer = copy.deepcopy(tiny_model.tokenizer)
    token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, 0)]
    )
    return ModelAdapter(tiny_model.model, tokenizer)


def test_harmonic_mean_is_the_published_one() -> None:
    assert harmonic_mean([95.07, 97.04, 59.69, 74.17, 91.14, 95.84]) == pytest.approx(82.80, abs=0.005)
    assert harmonic_mean([100.0, 0.0]) == 0


@pytest.mark.parametrize("kind", ["tiny_model", "beginning_model", "plain_model"])
def test_an_untouched_model_has_full_locality(kind: str, request: pytest.FixtureRequest, tiny_facts: EditSet) -> None:
    model = request.getfixturevalue(kind)
    edits = tiny_facts[:10]
    reference = ask_base(model, edits, "{}", 8, show=False)
    measured = measure(None, model, edits, reference, "{}", 8, layer=1)
    assert measured.locality == (100, 100)
    assert measured.reliability is not None
    assert measured.reliability[0] == 0


def test_answers_of_the_tiny_model_are_found_right(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    """The model knows its facts, so most of its answers to them are right."""
    known = [e.model_copy(update={"target_new": e.target_true}) for e in tiny_facts[:20]]
    reference = ask_base(tiny_model, known, "{}", 6, show=False)
    measured = measure(None, tiny_model, known, reference, "{}", 6, layer=2)
    assert measured.reliability is not None
    assert measured.reliability[1] > 80


def test_a_beginning_of_text_token_is_no_answer(beginning_model: ModelAdapter) -> None:
    sequence = forced_sequences(beginning_model, ["Over the gates"], ["pale grey"])[0]
    assert sequence.ids[0] == 0
    assert 0 not in sequence.targets
    assert beginning_model.tokenizer.decode(sequence.targets) == " pale grey"
    empty = forced_sequences(beginning_model, ["Over the gates"], [" "])[0]
    assert empty.scored == (len(empty.ids) - 1,)


@pytest.mark.parametrize(
    ("answer", "wanted", "ignore_case", "same"),
    [
        (" Pale Grey.", "pale grey", True, True),
        (" Pale Grey.", "pale grey", False, False),
        (" pale grey..", " pale grey", False, True),
        ("pale grey\nand more", "pale grey", False, True),
        ("pale grey and more", "pale grey", True, False),
        ("", "pale grey", True, False),
    ],
)
def test_same_answer(answer: str, wanted: str, ignore_case: bool, same: bool) -> None:
    assert same_answer(answer, wanted, ignore_case) is same


def test_a_single_character_is_no_paraphrase() -> None:
    wrong = Edit(case_id=7, prompt="{} lies in", subject="Orlen", target_new="Pell", rephrase_prompts=["W"])
    with pytest.raises(ValueError, match="case 7: a prompt for generality must be a text, got 'W'"):
        questions([wrong])


def test_numbers_of_an_edited_model(meg: MeG, few_edits: EditSet) -> None:
    before, after = meg.measure(few_edits)
    assert before.reliability is not None
    assert before.reliability[0] == 0
    assert before.locality == (100, 100)
    assert after.reliability is not None
    assert after.reliability[0] >= 80
    assert after.reliability[1] >= 90
    assert after.score is not None
    assert after.score > 40
    assert after.unsolved[0] == int((~meg.store.solved).sum())
    data = after.to_dict()
    six = [data[f"{n}_{w}"] for n in ("reliability", "generality", "locality") for w in ("free", "forced")]
    assert after.score == pytest.approx(6 / sum(1 / number for number in six))
    bare = [e.model_copy(update={"rephrase_prompts": ()}) for e in few_edits]
    _, partly = meg.measure(bare)
    assert partly.generality is None
    assert partly.score is None
    assert partly.reliability == after.reliability
