"""What is checked about a stream of edits: all problems at once, what is skipped, and how batches are cut."""

import copy

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastedit.records.check import check_edits
from fastedit.records.edit import Edit, EditSet, InvalidEdits, Probe, Problem

PLAIN = {"case_id": 7, "prompt": "The Orlen bridge is in", "subject": "Orlen bridge", "target_new": "Tavisk"}


def edit(**changes):
    return Edit(**{**PLAIN, **changes})


def problems_of(edits, *arguments, **options):
    with pytest.raises(InvalidEdits) as caught:
        check_edits(edits, *arguments, **options)
    return caught.value.problems


def ids(batches):
    return [[edit.case_id for edit in batch] for batch in batches]


def test_edits_are_named_by_position_and_cut_into_batches():
    edits = [edit(case_id=None), edit(), edit(case_id=None), edit(case_id="b")]
    batches, skipped = check_edits(edits, 3)
    assert ids(batches) == [[0, 7, 2], ["b"]]
    assert skipped == ()
    assert edits[0].case_id is None


def test_batches_keep_source_and_lines():
    edits = EditSet(tuple(edit(case_id=number) for number in range(5)), source="facts.jsonl", lines=(1, 2, 4, 5, 9))
    batches, _ = check_edits(edits, 2)
    assert [batch.lines for batch in batches] == [(1, 2), (4, 5), (9,)]
    assert {batch.source for batch in batches} == {"facts.jsonl"}


def test_a_case_id_stands_once():
    (problem,) = problems_of([edit(case_id=None), edit(case_id="0")], 1)
    assert str(problem) == "edits[1]: case 0, field 'case_id': must be unique, but '0' already names case 0 (edits[0])"


def test_one_batch_cannot_hold_two_targets_for_one_prompt():
    three = edit(), edit(case_id=8, target_new="Morwen"), edit(case_id=9, target_new="Morwen")
    edits = EditSet(three, source="facts.jsonl", lines=(1, 2, 3))
    found = problems_of(edits, 3)
    assert [(p.source, p.line, p.case_id, p.field) for p in found] == [
        ("facts.jsonl", 2, 8, "target_new"),
        ("facts.jsonl", 3, 9, "target_new"),
    ]
    assert "'Morwen' contradicts case 7 (line 1), which wants 'Tavisk'" in found[0].message
    # Across batches the later target wins, and one target may be asked for twice.
    assert ids(check_edits(edits, 1).batches) == [[7], [8], [9]]
    assert ids(check_edits(edits[1:], 2).batches) == [[8, 9]]


def test_what_was_changed_without_a_check_is_seen():
    changed = edit().model_copy(update={"case_id": 8, "subject": "Pell"})
    found = problems_of([edit(), changed, {"prompt": "x"}, edit()], 4)
    assert [(p.source, p.case_id, p.field) for p in found] == [
        ("edits[1]", 8, "subject"),
        ("edits[2]", None, None),
        ("edits[3]", 7, "case_id"),
    ]
    assert "must be an Edit, got {'prompt': 'x'}" in found[1].message


MIXED = EditSet(
    (
        edit(case_id=0),
        edit(case_id=1).model_copy(update={"subject": "Pell"}),
        edit(case_id=2, target_new="Morwen"),
        edit(case_id=3, target_new="Pell"),
        edit(case_id=0, prompt="The old Orlen bridge is in"),
        edit(case_id=5, prompt="The old Orlen bridge is in", target_new="Morwen"),
        edit(case_id=1, prompt="The new Orlen bridge is in"),
        "no edit",
    ),
    source="facts.jsonl",
    lines=(1, 2, 3, 4, 5, 6, 7, 8),
    skipped=(Problem("was skipped in reading"),),
)


def test_skipping_leaves_out_what_refusing_tells_of():
    batches, skipped = check_edits(MIXED, 2, on_invalid="skip")
    assert skipped == problems_of(MIXED, 2)
    assert [(problem.line, problem.field) for problem in skipped] == [
        *((2, "subject"), (4, "target_new"), (5, "case_id"), (7, "case_id")),
        (8, None),
    ]
    # Case 2 does not move up into the batch of case 0, which it contradicts.
    assert ids(batches) == [[0], [2], [5]]
    assert [batch.lines for batch in batches] == [(1,), (3,), (6,)]
    assert {batch.skipped for batch in batches} == {()}


def test_when_nothing_is_left_skipping_fails_too():
    wrong = edit().model_copy(update={"target_new": ""})
    assert [problem.field for problem in problems_of([wrong], 1, on_invalid="skip")] == ["target_new"]
    assert [problem.message for problem in problems_of([], 1, on_invalid="skip")] == ["no edits to write"]


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


def test_positions_are_counted(tokenizer):
    # "The Orlen bridge is in" and "Tavisk" are six words.
    edits = EditSet((edit(),), source="facts.jsonl", lines=(4,))
    check_edits(edits, 1, tokenizer=tokenizer, max_positions=9, template_tokens=3)
    (problem,) = problems_of(edits, 1, tokenizer=tokenizer, max_positions=8, template_tokens=3)
    assert str(problem) == (
        "facts.jsonl:4: case 7, field 'prompt': must fit into the model's 8 positions, got 9 tokens "
        "(6 of prompt and target, 3 of the longest template)"
    )


def test_positions_of_what_is_only_measured_are_counted_without_a_template(tokenizer):
    long = "far away " * 4
    edits = [
        edit(case_id=1, target_true="Morwen", rephrase_prompts=["Orlen bridge in", f"{long} is the Orlen bridge in"]),
        edit(case_id=2, locality=[Probe("The Pell tower is in", "Dunmere"), (f"The {long} far tower is in", "Pell")]),
        edit(case_id=3, portability={"hop": [(f"The {long} far river is the", ["Orr", "Rohr"])]}),
    ]
    check_edits(edits, 3, tokenizer=tokenizer, max_positions=14, template_tokens=8)
    found = problems_of(edits, 3, tokenizer=tokenizer, max_positions=13)
    assert [(problem.case_id, problem.field) for problem in found] == [
        (1, "rephrase_prompts[1]"),
        (2, "locality[1].prompt"),
        (3, "portability[0].prompt"),
    ]
    assert "got 14 tokens (14 of prompt and target)" in found[0].message


@pytest.mark.parametrize("kind", ["tokenizer", "byte_tokenizer"])
def test_texts_that_give_no_token_are_refused(kind, request):
    edits = [
        edit(),
        edit(case_id=1, prompt="The bridge is in", subject="bridge", target_new="\u00ad"),
        edit(case_id=2, prompt="The \u00ad is in", subject="\u00ad"),
        edit(case_id=3, target_true="\u00ad", locality=[("Pell is in", "x"), ("Rook is in", ["y", "\u00ad"])]),
    ]
    check_edits(edits, 4)
    found = problems_of(edits, 4, tokenizer=request.getfixturevalue(kind))
    assert [(problem.source, problem.field) for problem in found] == [
        ("edits[1]", "target_new"),
        ("edits[2]", "subject"),
        ("edits[3]", "target_true"),
        ("edits[3]", "locality[1].answers[1]"),
    ]


def test_the_right_record_is_named_beyond_the_first_group(tokenizer):
    edits = [edit(case_id=number) for number in range(1500)]
    for number in (1023, 1400):
        edits[number] = edit(case_id=number, prompt="The bridge " + "far " * 50, subject="bridge")
    found = problems_of(edits, 1500, tokenizer=tokenizer, max_positions=20)
    assert [problem.source for problem in found] == ["edits[1023]", "edits[1400]"]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="max_positions=9 needs a tokenizer"):
        check_edits([edit()], 1, max_positions=9)
    with pytest.raises(TypeError, match="fast one, got str"):
        check_edits([edit()], 1, tokenizer="smollm2")
    with pytest.raises(ValueError, match="on_invalid must be 'refuse' or 'skip', got 'drop'"):
        check_edits([edit()], 1, on_invalid="drop")


def test_the_editor_writes_what_is_left(tiny_editor, tiny_facts):
    wrong = tiny_facts[1].model_copy(update={"target_new": ""})
    long = tiny_facts[2].model_copy(update={"rephrase_prompts": ("very " * 300,)})
    first, second = tiny_editor(), tiny_editor()
    run = first.edit([tiny_facts[0], wrong, long, tiny_facts[3]], batch_size=2, on_invalid="skip")
    assert [edit.case_id for edit in run.edits] == [0, 3]
    assert [(problem.case_id, problem.field) for problem in run.skipped] == [
        (1, "target_new"),
        (2, "rephrase_prompts[0]"),
    ]
    assert [problem["case_id"] for problem in run.to_dict()["skipped"]] == [1, 2]
    second.edit([tiny_facts[0]])
    second.edit([tiny_facts[3]])
    assert first.weights.fingerprint() == second.weights.fingerprint()
    before = second.weights.fingerprint()
    with pytest.raises(InvalidEdits):
        second.edit([tiny_facts[5], wrong])
    assert second.weights.fingerprint() == before


def test_a_subject_is_asked_for_only_where_it_is_read():
    edits = EditSet((edit(), edit(case_id=8, subject=None)), source="facts.jsonl", lines=(1, 2))
    (problem,) = problems_of(edits, 2)
    assert str(problem).startswith("facts.jsonl:2: case 8, field 'subject': is missing; methods that locate")
    assert ids(check_edits(edits, 2, needs_subject=False).batches) == [[7, 8]]


def test_two_places_of_the_subject_are_told_with_the_one_that_is_taken(caplog):
    edits = [
        edit(prompt="Mali sells to Chad; the largest city of Mali is", subject="Mali"),
        edit(case_id=8, prompt="In code, {} and Mali mean", subject="Mali"),
        edit(case_id=9, prompt="{} borders Nigeria and", subject="Niger"),
        *(edit(case_id=number, prompt="Mali is Mali in", subject="Mali") for number in (10, 11)),
    ]
    check_edits(edits, 1)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("4 edits name their subject several times in the prompt; {} in the prompt says where")
    assert "case 7 (edits[0]): 'Mali' is edited at character 40 of 'Mali sells to Chad" in line
    assert "case 8 (edits[1]): 'Mali' is edited at character 9 of 'In code, Mali and Mali mean'" in line
    assert line.endswith("; and 1 more")
    assert "Nigeria" not in line

    caplog.clear()
    check_edits(edits, 1, needs_subject=False)
    check_edits(edits[2:3], 1)
    assert not caplog.records
    check_edits(edits[:1], 1)
    assert caplog.records[0].getMessage().startswith("1 edit names its subject several times in the prompt; {} in")


def test_a_token_without_a_row_in_the_embedding_is_an_error_of_its_record(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_tokens(["<new>"])
    edits = [edit(), edit(case_id=8, prompt="An Orlen bridge is in", target_new="<new> Rook")]
    edits += [edit(case_id=9, locality=("a <new> is", "b"))]
    check_edits(edits, 3, tokenizer=tokenizer, n_embeddings=257)
    found = problems_of(edits, 3, tokenizer=tokenizer, n_embeddings=256)
    assert [(problem.case_id, problem.field) for problem in found] == [(8, "target_new"), (9, "locality[0].prompt")]
    assert "has the token '<new>' of id 256, for which the model's embedding of 256 rows has none" in found[0].message
    assert "model.resize_token_embeddings(len(tokenizer))" in found[0].message


def test_white_space_at_the_joint_is_no_contradiction():
    edits = [edit(), edit(case_id=8, target_new=" Tavisk"), edit(case_id=9, prompt="The Orlen bridge is in ")]
    assert ids(check_edits(edits, 3).batches) == [[7, 8, 9]]
    (problem,) = problems_of([edit(), edit(case_id=8, target_new="Tavisk\n")], 2)
    assert "contradicts case 7" in problem.message
