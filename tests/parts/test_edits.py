"""The edit record and its checks: what is made of good values, and that every problem names its place."""

import pickle
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastedit.edits import (
    Edit,
    EditSet,
    InvalidEdits,
    Probe,
    Problem,
    assign_case_ids,
    check_batch,
    check_edits,
)

PLAIN = {"case_id": 7, "prompt": "The Orlen bridge is in", "subject": "Orlen bridge", "target_new": "Tavisk"}


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


def test_the_last_occurrence_of_the_subject_is_the_edited_one():
    edit = Edit(prompt="Rook said that Rook lives in", subject="Rook", target_new="Pell")
    assert edit.subject_span == (15, 19)


def test_braces_that_belong_to_the_subject_stay():
    edit = Edit(prompt="The type of f{} is", subject="f{}", target_new="int")
    assert edit.prompt == "The type of f{} is"
    assert Edit(prompt="The type of {} is", subject="f{}", target_new="int").prompt == edit.prompt


def test_braces_in_rephrase_prompts_are_filled_unless_they_name_the_subject():
    texts = ["{} has the twin", "while(x) {} Tavisk has the twin"]
    edit = Edit(prompt="The twin of {} is", subject="Tavisk", target_new="Pell", rephrase_prompts=texts)
    assert edit.rephrase_prompts == ("Tavisk has the twin", texts[1])


def test_surrounding_whitespace_is_dropped():
    edit = Edit(prompt="The twin of {} is ", subject=" Tavisk\n", target_new=" Pell ", target_true="\tOrlen")
    assert (edit.prompt, edit.subject) == ("The twin of Tavisk is", "Tavisk")
    assert (edit.target_new, edit.target_true) == ("Pell", "Orlen")


def test_an_edit_is_frozen_hashable_and_comes_back_from_pickle():
    edit = Edit(**PLAIN, locality=Probe("The Pell tower is in"))
    with pytest.raises(ValueError, match="frozen"):
        edit.prompt = "x"
    assert {edit: 1}[pickle.loads(pickle.dumps(edit))] == 1
    assert edit.locality == (Probe("The Pell tower is in", None),)


def test_the_count_is_left_out_at_twenty_and_singular_at_twenty_one():
    problems = [Problem("is wrong")] * 21
    assert str(InvalidEdits(problems[:20])).count("\n") == 19
    assert str(InvalidEdits(problems)).endswith("\n... and 1 more error")


def test_an_edit_made_by_hand_names_all_that_is_wrong():
    with pytest.raises(InvalidEdits) as caught:
        Edit(case_id=3, prompt="The capital is", subject="Pell", target_nwe="x", locality=[("a", 5), "b"])
    assert str(caught.value).splitlines() == [
        "case 3, field 'subject': 'Pell' does not occur in the prompt 'The capital is'; "
        "write {} where the subject stands",
        "case 3, field 'target_new': is missing",
        "case 3, field 'locality[0][1]': must be a string, got 5",
        "case 3, field 'locality[1]': must be a (prompt, answer) pair, got 'b'",
        "case 3, field 'target_nwe': is unknown; did you mean 'target_new'?",
    ]


def test_case_ids_are_assigned_by_position_and_never_twice():
    edits = [Edit(**without(PLAIN, "case_id")), Edit(**PLAIN), Edit(**without(PLAIN, "case_id"))]
    assert [edit.case_id for edit in assign_case_ids(edits)] == [0, 7, 2]
    assert [edit.case_id for edit in assign_case_ids(iter(edits), first=10)] == [10, 7, 12]
    with pytest.raises(InvalidEdits, match=r"edits\[2\]: case 7, field 'case_id': .* case 7 \(edits\[1\]\)"):
        assign_case_ids(edits, first=5)


def test_check_batch_refuses_two_targets_and_repeated_ids():
    other = Edit(**{**PLAIN, "case_id": 8, "target_new": "Morwen"})
    three = (Edit(**PLAIN), other, other.model_copy(update={"case_id": 9}))
    edits = EditSet(three, source="facts.jsonl", lines=(1, 2, 3))
    check_batch(edits[1:])
    with pytest.raises(InvalidEdits) as caught:
        check_batch(edits)
    assert [(p.source, p.line, p.case_id, p.field) for p in caught.value.problems] == [
        ("facts.jsonl", 2, 8, "target_new"),
        ("facts.jsonl", 3, 9, "target_new"),
    ]
    assert "'Morwen' contradicts case 7 (line 1), which wants 'Tavisk'" in str(caught.value)
    with pytest.raises(InvalidEdits, match=r"edits\[1\]: case 7, field 'case_id': must be unique"):
        check_batch([edits[0], edits[0]])


def test_check_edits_sees_what_was_changed_without_a_check():
    good = Edit(**PLAIN)
    changed = good.model_copy(update={"case_id": 8, "subject": "Pell"})
    with pytest.raises(InvalidEdits) as caught:
        check_edits([good, changed, {"prompt": "x"}, good])
    assert [(p.source, p.case_id, p.field) for p in caught.value.problems] == [
        ("edits[3]", 7, "case_id"),
        ("edits[1]", 8, "subject"),
        ("edits[2]", None, None),
    ]


def fast_tokenizer(model, splitter):
    """It drops soft hyphens, so that a text can come to nothing."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace("\u00ad", "")
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word."""
    return fast_tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"), pre_tokenizers.WhitespaceSplit())


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token per byte, so that the space before a target is a token by itself."""
    alphabet = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return fast_tokenizer(models.BPE(vocab=alphabet, merges=[]), splitter)


def test_check_edits_with_a_tokenizer_counts_positions(tokenizer):
    # "The Orlen bridge is in" and "Tavisk" are six words.
    edits = EditSet((Edit(**PLAIN),), source="facts.jsonl", lines=(4,))
    check_edits(edits, tokenizer=tokenizer, max_positions=9, template_tokens=3)
    with pytest.raises(InvalidEdits) as caught:
        check_edits(edits, tokenizer=tokenizer, max_positions=8, template_tokens=3)
    assert str(caught.value) == (
        "facts.jsonl:4: case 7, field 'prompt': must fit into the model's 8 positions, got 9 tokens "
        "(6 of prompt and target, 3 of the longest template)"
    )


@pytest.mark.parametrize("kind", ["tokenizer", "byte_tokenizer"])
def test_check_edits_refuses_texts_that_give_no_token(kind, request):
    edits = [
        Edit(**PLAIN),
        Edit(prompt="The bridge is in", subject="bridge", target_new="\u00ad"),
        Edit(prompt="The \u00ad is in", subject="\u00ad", target_new="Tavisk"),
    ]
    check_edits(edits)
    with pytest.raises(InvalidEdits) as caught:
        check_edits(edits, tokenizer=request.getfixturevalue(kind))
    assert [(p.source, p.field) for p in caught.value.problems] == [
        ("edits[1]", "target_new"),
        ("edits[2]", "subject"),
    ]


def test_check_edits_names_the_right_record_beyond_the_first_group(tokenizer):
    edits = [Edit(**{**PLAIN, "case_id": number}) for number in range(1500)]
    edits[1023] = edits[1400] = Edit(prompt="The bridge " + "far " * 50, subject="bridge", target_new="Tavisk")
    with pytest.raises(InvalidEdits) as caught:
        check_edits(edits, tokenizer=tokenizer, max_positions=20)
    assert [problem.source for problem in caught.value.problems] == ["edits[1023]", "edits[1400]"]


def test_check_edits_says_what_tokenizer_it_needs():
    with pytest.raises(ValueError, match="max_positions=9 needs a tokenizer"):
        check_edits([Edit(**PLAIN)], max_positions=9)
    with pytest.raises(TypeError, match="fast one, got str"):
        check_edits([Edit(**PLAIN)], tokenizer="smollm2")


def test_importing_the_module_does_not_import_torch():
    code = "import sys, fastedit.edits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
