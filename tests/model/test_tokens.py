"""Positions in tokenised texts: lookup tokens, scored positions and their targets, under three kinds of tokenizer."""

import copy

import pytest
from tokenizers import processors

from fastedit.model.tokens import (
    encode,
    lookup_position,
    lookup_prefix,
    prompt_ids,
    rewrite_sequences,
    score_sequence,
    subject_sequences,
    target_sequences,
    whole_sequences,
)
from fastedit.records.edit import Edit
from fastedit.records.join import joined

TEMPLATES = ("{}", "The old house. {}", "東京 grew rich. {}")

# name: prompt, subject, target
EDITS = {
    "at the start": ("Tavisk is a city on the river", "Tavisk", "Pell"),
    "in the middle": ("The Orlen bridge is in", "Orlen bridge", "Old Norse"),
    "twice": ("Rook said that Rook lives in", "Rook", "the house"),
    "unicode": ("The capital of Żubrówka is", "Żubrówka", "Łomża"),
    "three-byte characters": ("In 東京 they speak", "東京", "東"),
    "at the end": ("You should learn about the guild", "the guild", "coal, silver."),
    "before punctuation": ("Because of Pell, we go to", "Pell", "Tavisk"),
    "one letter": ("A baker is", "A", "I"),
}


@pytest.fixture(params=["random_tokenizer", "bos_tokenizer", "fallback_tokenizer"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def edit_of(name):
    prompt, subject, target = EDITS[name]
    return Edit(prompt=prompt, subject=subject, target_new=target)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", EDITS)
def test_the_lookup_token_is_the_one_that_ends_the_subject(tokenizer, name, template):
    edit = edit_of(name)
    [[sequence]] = rewrite_sequences(tokenizer, [edit], [template])
    prompt = template.replace("{}", edit.prompt)
    end = prompt.rindex(edit.subject) + len(edit.subject)
    # Up to the lookup token the text is read to its subject's end, and one token less does not reach it.
    text = joined(prompt, edit.target_new).text
    [ids], [offsets] = encode(tokenizer, [text])
    assert list(lookup_prefix(sequence)) == ids[: sequence.lookup + 1]
    assert offsets[sequence.lookup][0] < end <= offsets[sequence.lookup][1]
    assert offsets[sequence.lookup + 1][0] >= end
    assert tokenizer.decode(lookup_prefix(sequence), skip_special_tokens=True).endswith(edit.subject)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", EDITS)
def test_what_is_scored_is_the_whole_target_and_nothing_else(tokenizer, name, template):
    edit = edit_of(name)
    [[sequence]] = rewrite_sequences(tokenizer, [edit], [template])
    assert tokenizer.decode(sequence.targets).strip() == edit.target_new
    text = joined(template.replace("{}", edit.prompt), edit.target_new).text
    [ids], _ = encode(tokenizer, [text])
    assert [*sequence.ids, sequence.targets[-1]] == ids
    assert [ids[position + 1] for position in sequence.scored] == list(sequence.targets)
    assert sequence.scored[-1] == len(sequence.ids) - 1


@pytest.mark.parametrize("name", ["random_tokenizer", "fallback_tokenizer"])
def test_characters_that_fall_apart_into_bytes_are_looked_up_at_their_last_byte(name, request):
    tokenizer = request.getfixturevalue(name)
    edit = Edit(prompt="In 京都 Ĵø lives near", subject="京都 Ĵø", target_new="Ĵ京 house")
    for sequence in rewrite_sequences(tokenizer, [edit], ["{}", "東. {}"])[0]:
        assert tokenizer.decode(sequence.targets).strip() == "Ĵ京 house"
        read = tokenizer.decode(lookup_prefix(sequence), skip_special_tokens=True)
        assert read.endswith("京都 Ĵø")
        one_less = tokenizer.decode(lookup_prefix(sequence)[:-1], skip_special_tokens=True)
        assert not one_less.endswith("京都 Ĵø")
    [alone] = subject_sequences(tokenizer, [edit])
    assert tokenizer.decode(alone.ids, skip_special_tokens=True).strip() == "京都 Ĵø"


def test_every_edit_gets_its_sequences_in_the_order_of_the_templates(tokenizer):
    edits = [edit_of(name) for name in EDITS]
    found = rewrite_sequences(tokenizer, edits, TEMPLATES)
    assert [len(row) for row in found] == [len(TEMPLATES)] * len(edits)
    for edit, row in zip(edits, found, strict=True):
        for template, sequence in zip(TEMPLATES, row, strict=True):
            assert sequence == rewrite_sequences(tokenizer, [edit], [template])[0][0]
    assert rewrite_sequences(tokenizer, [], TEMPLATES) == []


def test_braces_of_the_prompt_are_no_place_for_a_template(tokenizer):
    edit = Edit(prompt="The type of f{} is", subject="f{}", target_new="new")
    plain, behind = rewrite_sequences(tokenizer, [edit], ["{}", "I think. {}"])[0]
    for sequence in (plain, behind):
        assert tokenizer.decode(sequence.targets).strip() == "new"
    [ids], _ = encode(tokenizer, ["I think. The type of f{} is new"])
    assert [*behind.ids, behind.targets[-1]] == ids


def test_the_beginning_of_text_token_is_kept_and_never_looked_up(bos_tokenizer, random_tokenizer):
    edit = Edit(prompt="A baker is", subject="A", target_new="I")
    [[sequence]] = rewrite_sequences(bos_tokenizer, [edit], ["{}"])
    assert sequence.ids[0] == bos_tokenizer.bos_token_id
    assert sequence.lookup == 1
    assert rewrite_sequences(random_tokenizer, [edit], ["{}"])[0][0].lookup == 0


@pytest.mark.parametrize("name", EDITS)
def test_subjects_are_read_alone_up_to_their_last_token(tokenizer, name):
    edit = edit_of(name)
    [sequence] = subject_sequences(tokenizer, [edit])
    [ids], [offsets] = encode(tokenizer, [f"{edit.subject} is a"])
    assert sequence.lookup == len(sequence.ids) - 1
    assert sequence.scored == (sequence.lookup,)
    assert sequence.targets == ()
    assert list(sequence.ids) == ids[: len(sequence.ids)]
    assert offsets[sequence.lookup][1] == len(edit.subject)
    assert tokenizer.decode(sequence.ids, skip_special_tokens=True).strip() == edit.subject


def test_target_sequences_have_no_lookup_token_and_one_space_at_the_seam(tokenizer):
    found = target_sequences(tokenizer, ["The twin of Tavisk is ", "The twin of Tavisk is"], ["Pell", " Pell"])
    assert found[0] == found[1]
    assert found[0].lookup == -1
    assert tokenizer.decode(found[0].targets).strip() == "Pell"
    with pytest.raises(ValueError, match="shorter"):
        target_sequences(tokenizer, ["one", "two"], ["Pell"])


@pytest.mark.parametrize(
    ("end", "wanted"),
    [(1, 1), (4, 1), (5, 2), (6, 4), (9, 4)],
)
def test_lookup_position_skips_tokens_without_characters(end, wanted):
    assert lookup_position([(0, 0), (0, 4), (4, 6), (6, 6), (5, 9), (9, 9)], end) == wanted


def test_a_text_without_a_token_for_the_subject_is_refused():
    with pytest.raises(ValueError, match="before character 3"):
        lookup_position([(0, 0), (3, 5)], 3)


@pytest.mark.parametrize("offsets", [[(0, 3), (3, 5)], [(0, 3), (5, 5)], [(0, 9), (9, 9)], []])
def test_a_target_without_a_token_of_its_own_is_refused(offsets):
    with pytest.raises(ValueError, match="no token of its own"):
        score_sequence([1] * len(offsets), offsets, 5)


def test_a_token_over_the_seam_and_a_special_token_at_the_end():
    sequence = score_sequence([7, 8, 9, 2], [(0, 3), (3, 6), (6, 8), (0, 0)], 5, lookup=0)
    assert (sequence.ids, sequence.lookup, sequence.scored, sequence.targets) == ((7, 8), 0, (0, 1), (8, 9))


JOINTS = {
    "Chinese": ("法国的首都是", "法国", "罗马", "罗马"),
    "a line break": ("Where does Rook live?\n", "Rook", "Pell", "Pell"),
    "a quote": ('The motto of Rook is "', "Rook", "Pell", "Pell"),
    "a space": ("The twin of Rook is ", "Rook", " Pell", " Pell"),
    "an end of the line": ("The twin of Rook is", "Rook", "Pell\n", " Pell\n"),
}


@pytest.mark.parametrize("name", JOINTS)
def test_every_method_reads_the_text_as_it_was_written(random_tokenizer, name):
    prompt, subject, target, scored = JOINTS[name]
    edit = Edit(prompt=prompt, subject=subject, target_new=target)
    [whole], _ = encode(random_tokenizer, [prompt.rstrip(" ") + scored])
    plain, behind = rewrite_sequences(random_tokenizer, [edit], ["{}", 'He said "so. {}'])[0]
    [asked] = target_sequences(random_tokenizer, [prompt], [target])
    [trained] = whole_sequences(random_tokenizer, [prompt], [target])

    assert [*plain.ids, plain.targets[-1]] == [*asked.ids, asked.targets[-1]] == list(trained.ids) == whole
    assert plain.targets == behind.targets == asked.targets == trained.targets
    assert random_tokenizer.decode(plain.targets) == scored
    # What is decoded behind the prompt is what was trained behind it.
    assert [*prompt_ids(random_tokenizer, [prompt])[0], *plain.targets] == whole


def test_what_an_edit_says_stands_between_is_trained(random_tokenizer):
    edit = Edit(prompt="The twin of Rook is", subject="Rook", target_new="Pell", join=": ")
    [[sequence]] = rewrite_sequences(random_tokenizer, [edit], ["{}"])
    assert random_tokenizer.decode(sequence.targets) == ": Pell"
    assert [sequence.targets] == [
        asked.targets for asked in target_sequences(random_tokenizer, [edit.prompt], [edit.target_new], [edit.join])
    ]


def test_the_key_is_read_where_the_slot_was(tokenizer):
    edit = Edit(prompt="{} lives where Rookwood grows near Rook, says", subject="Rook", target_new="Pell")
    for sequence in rewrite_sequences(tokenizer, [edit], TEMPLATES)[0]:
        assert tokenizer.decode(lookup_prefix(sequence), skip_special_tokens=True).endswith("Rook")
        assert "grows" not in tokenizer.decode(lookup_prefix(sequence))


@pytest.fixture(params=["append", "both"])
def closing_tokenizer(bos_tokenizer, request):
    """It puts its end token behind every text, as T5's and some fine-tuned models' do."""
    tokenizer = copy.deepcopy(bos_tokenizer)
    bos, end = tokenizer.bos_token, tokenizer.eos_token or tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {end}" if request.param == "both" else f"$A {end}",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in {bos, end}],
    )
    return tokenizer


def test_what_is_continued_ends_in_no_token_that_the_tokenizer_put_there(closing_tokenizer, bos_tokenizer):
    closed = closing_tokenizer("Rook is")["input_ids"]
    assert prompt_ids(closing_tokenizer, ["Rook is", "Rook is "]) == [closed[:-1]] * 2
    # One that the prompt itself ends in stays.
    written = closing_tokenizer.bos_token
    assert prompt_ids(closing_tokenizer, [f"Rook is{written}"]) == [
        closing_tokenizer(f"Rook is{written}")["input_ids"][:-1]
    ]
    assert prompt_ids(bos_tokenizer, ["Rook is"]) == [bos_tokenizer("Rook is")["input_ids"]]
    assert prompt_ids(bos_tokenizer, []) == []
