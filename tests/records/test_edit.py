"""The edit record: what is made of good values, and that every problem names its place."""

import inspect
import pickle
import subprocess
import sys

import pytest

from fastedit.records.edit import Edit, EditSet, InvalidEdits, Probe, Problem
from fastedit.runs.fields import recorded

PLAIN = {"case_id": 7, "prompt": "The Orlen bridge is in", "subject": "Orlen bridge", "target_new": "Tavisk"}


def test_the_last_occurrence_of_the_subject_is_the_edited_one():
    edit = Edit(prompt="Rook said that Rook lives in", subject="Rook", target_new="Pell")
    assert edit.subject_span == (15, 19)


def test_braces_that_belong_to_the_subject_stay():
    edit = Edit(prompt="The type of f{} is", subject="f{}", target_new="int")
    assert edit.prompt == "The type of f{} is"
    assert Edit(prompt="The type of {} is", subject="f{}", target_new="int").prompt == edit.prompt


def test_braces_in_rephrase_prompts_are_filled_unless_they_name_the_subject():
    texts = ["{} has the twin", "while(x) {} Tavisk has the twin"]
    fact = {"prompt": "The twin of {} is", "subject": "Tavisk", "target_new": "Pell"}
    edit = Edit(**fact, rephrase_prompts=texts, generation_prompts="{} is known for")
    assert edit.rephrase_prompts == ("Tavisk has the twin", texts[1])
    assert edit.generation_prompts == ("Tavisk is known for",)


def test_prompts_and_targets_keep_their_outer_white_space():
    asked = {"rephrase_prompts": "Tavisk:\n", "generation_prompts": " {}\n", "locality": ("Pell is ", " Rook\n", " g ")}
    edit = Edit(prompt="The twin of {} is ", subject=" Tavisk\n", target_new=" Pell ", target_true="\tOrlen", **asked)
    assert (edit.prompt, edit.subject) == ("The twin of Tavisk is ", "Tavisk")
    assert (edit.target_new, edit.target_true) == (" Pell ", "\tOrlen")
    assert (edit.rephrase_prompts, edit.generation_prompts) == (("Tavisk:\n",), (" Tavisk\n",))
    assert edit.locality == (Probe("Pell is ", (" Rook\n",), "g"),)


def test_an_edit_is_frozen_hashable_and_comes_back_from_pickle():
    edit = Edit(**PLAIN, locality=Probe("The Pell tower is in"), portability={"hop": ("Its river is the", "Orr")})
    with pytest.raises(ValueError, match="frozen"):
        edit.prompt = "x"
    assert {edit: 1}[pickle.loads(pickle.dumps(edit))] == 1


PELL = "The Pell tower is in"
RIVER = "The river of the Orlen bridge is the"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (None, ()),
        ([], ()),
        ({}, ()),
        (Probe(PELL), (Probe(PELL, (), "DEFAULT"),)),
        ((PELL, "Dunmere"), (Probe(PELL, ("Dunmere",), "DEFAULT"),)),
        ({"prompt": PELL, "answers": "Dunmere"}, (Probe(PELL, ("Dunmere",), "DEFAULT"),)),
        ([(PELL, ["Dunmere ", "Old Dunmere"])], (Probe(PELL, ("Dunmere ", "Old Dunmere"), "DEFAULT"),)),
        ([[PELL, None], (RIVER, "Orr", "hop")], (Probe(PELL, (), "DEFAULT"), Probe(RIVER, ("Orr",), "hop"))),
        ([Probe(PELL, "Dunmere", "near")], (Probe(PELL, ("Dunmere",), "near"),)),
        (
            {"hop": [(RIVER, "Orr"), {"prompt": PELL}], "alias": (PELL, "Dunmere"), "none": None},
            (Probe(RIVER, ("Orr",), "hop"), Probe(PELL, (), "hop"), Probe(PELL, ("Dunmere",), "alias")),
        ),
        ({"hop": Probe(PELL, (), "own")}, (Probe(PELL, (), "own"),)),
    ],
    ids=[
        *("nothing", "no probes", "no groups", "a probe", "a pair", "a dict", "several answers", "a group in a triple"),
        *("one answer in a probe", "a dict of groups", "a probe with a group in a group"),
    ],
)
def test_probes_may_be_written_in_many_ways(written, read):
    edit = Edit(**PLAIN, locality=written, portability=written)
    defaults = {"locality": "neighborhood", "portability": "portability"}
    for field, group in defaults.items():
        wanted = tuple(probe._replace(group=group) if probe.group == "DEFAULT" else probe for probe in read)
        assert getattr(edit, field) == wanted
    assert Edit(**dict(edit)) == edit


def test_the_answer_of_a_probe_is_its_first_one():
    assert Probe(PELL, ("Dunmere", "Orlen")).answer == "Dunmere"
    assert Probe(PELL).answer is None


WRONG_PROBES = {
    "a string": ("Pell", "locality", "must be a list, got 'Pell'"),
    "a number in a group": ({"hop": 5}, "locality[0]", "must be a (prompt, answer) pair, got 5"),
    "four parts": ([("a", "b", "c", "d")], "locality[0]", "must be a (prompt, answer) pair, got ('a', 'b', 'c', 'd')"),
    "a misspelt part": ([{"prompt": "a", "answer": "b"}], "locality[0].answer", "did you mean 'answers'?"),
    "no prompt": ([{"answers": "b"}], "locality[0].prompt", "is missing"),
    "an empty alias": ([("a", ["b", " "])], "locality[0].answers[1]", "must not be empty, got ' '"),
    "an empty group": ([("a", "b", "")], "locality[0].group", "must not be empty"),
    "an unchecked probe": (Probe("a", 5), "locality[0].answers", "must be a list, got 5"),
}


@pytest.mark.parametrize("kind", WRONG_PROBES)
def test_what_is_wrong_with_a_probe_is_told_by_its_place(kind):
    written, field, message = WRONG_PROBES[kind]
    with pytest.raises(InvalidEdits) as caught:
        Edit(**PLAIN, locality=written)
    (problem,) = caught.value.problems
    assert (problem.case_id, problem.field) == (7, field)
    assert message in problem.message


def test_the_signature_names_every_field_and_those_that_must_be_given():
    parameters = inspect.signature(Edit).parameters
    assert set(parameters) == set(Edit.model_fields)
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values())
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    assert required == {name for name, field in Edit.model_fields.items() if field.is_required()}
    defaults = {name: field.default for name, field in Edit.model_fields.items() if not field.is_required()}
    assert {name: parameters[name].default for name in defaults} == defaults


def test_the_repr_is_one_line_that_counts_what_is_measured():
    edit = Edit(**PLAIN, target_true="Pell", rephrase_prompts=["a", "b"], locality=("c", "d"))
    assert repr(edit) == (
        "Edit(case_id=7, prompt='The Orlen bridge is in', subject='Orlen bridge', target_new='Tavisk', "
        "target_true='Pell', rephrase_prompts=<2>, locality=<1>)"
    )
    unnamed = Edit(prompt="{} is", subject="Rook", target_new="Pell")
    assert repr(unnamed) == "Edit(prompt='Rook is', subject='Rook', target_new='Pell')"


def test_the_count_is_left_out_at_twenty_and_singular_at_twenty_one():
    problems = [Problem("is wrong")] * 21
    assert str(InvalidEdits(problems[:20])).count("\n") == 19
    assert str(InvalidEdits(problems)).endswith("\n... and 1 more error")


def test_an_edit_made_by_hand_names_all_that_is_wrong():
    with pytest.raises(InvalidEdits) as caught:
        Edit(case_id=3, prompt="The capital is", subject="Pell", target_nwe="x", locality=[("a", 5), "b"])
    assert str(caught.value).splitlines() == [
        "case 3, field 'subject': 'Pell' does not occur in the prompt 'The capital is', where it is edited; "
        "write {} where the subject stands",
        "case 3, field 'target_new': is missing",
        "case 3, field 'locality[0].answers': must be a list, got 5",
        "case 3, field 'locality[1]': must be a (prompt, answer) pair, got 'b'",
        "case 3, field 'target_nwe': is unknown; did you mean 'target_new'?",
    ]


def test_a_subject_is_optional_but_not_where_the_prompt_has_a_slot_for_it():
    edit = Edit(prompt="Ines Maro plays the", target_new="oboe", rephrase_prompts="In {}")
    assert (edit.subject, edit.rephrase_prompts) == (None, ("In {}",))
    with pytest.raises(ValueError, match="no subject"):
        _ = edit.subject_span
    with pytest.raises(InvalidEdits) as caught:
        Edit(case_id=3, prompt="{} plays the", target_new="oboe")
    assert str(caught.value) == ("case 3, field 'subject': is missing, and the prompt '{} plays the' has a {} for it")


SLOTS = {
    "inside a longer word": ("{} borders Nigeria, and its capital is", "Niger", 0),
    "inside a word in front": ("Nigeria borders {}, whose capital is", "Niger", 16),
    "inside two words joined": ("{} is older than JavaScript and was designed by", "Java", 0),
    "inside an adjective": ("{} buys more tulips than Omani farms grow, and sells mainly", "Oman", 0),
    "before whole words": ("{} was founded where Port Maro now stands; Port's old name is", "Port", 0),
    "the last of two slots": ("{} and not {} borders Nigeria", "Niger", 14),
    "no slot, a longer word behind": ("Iran, as Iranians say, lies next to", "Iran", 0),
    "no slot, digits behind": ("Apollo 1 and Apollo 11 flew in", "Apollo 1", 0),
    "no slot, an underscore behind": ("the call get and get_all take", "get", 9),
    "no slot, a combining mark behind": ("Rama u Rama\u0301", "Rama", 0),
    "no slot, two whole words": ("Mali sells gold to Chad; the largest city of Mali is", "Mali", 45),
    "no slot, no whole word": ("Nigerian Nigeriens", "Niger", 9),
    "no slot, a script without spaces": ("\u6cd5\u56fd\u7684\u9996\u90fd\u662f", "\u6cd5\u56fd", 0),
    "no slot, an s behind": ("Zeldan's harbour and Zeldanese food are", "Zeldan", 0),
    "a subject that ends in no letter": ("C++ and C++11 are", "C++", 8),
}


@pytest.mark.parametrize("name", SLOTS)
def test_the_subject_is_edited_where_its_slot_is_and_without_one_where_it_is_a_whole_word(name):
    prompt, subject, start = SLOTS[name]
    edit = Edit(prompt=prompt, subject=subject, target_new="Lyon")
    assert edit.subject_span == (start, start + len(subject))
    assert edit.prompt[slice(*edit.subject_span)] == subject
    # What is checked again, copied or sent to another process stays.
    assert Edit(**dict(edit)) == edit == pickle.loads(pickle.dumps(edit))


def test_a_slot_is_kept_only_where_the_rule_would_take_another_place():
    assert Edit(prompt="{} borders Nigeria and", subject="Niger", target_new="Chad").subject_at is None
    assert Edit(prompt="{} and the city of Port Maro in Port are", subject="Port", target_new="old").subject_at == 0


def test_a_slot_in_a_rephrase_is_filled_beside_a_longer_word():
    edit = Edit(prompt="{} borders", subject="Niger", target_new="Chad", rephrase_prompts="Nigeria and {} border")
    assert edit.rephrase_prompts == ("Nigeria and Niger border",)


@pytest.mark.parametrize("at", [-1, 1, 99])
def test_a_place_at_which_the_subject_does_not_begin_is_refused(at):
    with pytest.raises(InvalidEdits, match="field 'subject_at': must be the character of the prompt"):
        Edit(prompt="Mali and Mali", subject="Mali", target_new="Lyon", subject_at=at)
    assert Edit(prompt="Mali and Mali", subject="Mali", target_new="Lyon", subject_at=0).subject_span == (0, 4)


ALMOST = {
    "an apostrophe": ("Queen\u2019s Gate lies in", "Queen's Gate", "U+2019 RIGHT SINGLE QUOTATION MARK (\u2019) where"),
    "an apostrophe in the subject": ("Queen's Gate lies in", "Queen\u2019s Gate", "the subject has U+2019 RIGHT"),
    "a no-break space": ("Port\u00a0Maro lies on", "Port Maro", "U+00A0 NO-BREAK SPACE where the subject has U+0020"),
    "a no-break hyphen": ("Jean\u2011Luc was born in", "Jean-Luc", "U+2011 NON-BREAKING HYPHEN (\u2011) where"),
    "two of them": ("Jean\u2011Luc\u00a0Maro is", "Jean-Luc Maro", "U+00A0 NO-BREAK SPACE where"),
    "case as well": ("queen\u2019s gate lies in", "Queen's Gate", "U+2019 RIGHT SINGLE QUOTATION MARK"),
    "a soft hyphen": ("Zel\u00addan lies in", "Zeldan", "what is not seen: U+00AD SOFT HYPHEN"),
    "a zero-width space": ("Port Maro lies in", "Port\u200b Maro", "what is not seen: U+200B ZERO WIDTH SPACE"),
}


@pytest.mark.parametrize("name", ALMOST)
def test_what_differs_between_subject_and_prompt_is_told(name):
    prompt, subject, message = ALMOST[name]
    with pytest.raises(InvalidEdits) as caught:
        Edit(prompt=prompt, subject=subject, target_new="Oslo")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_edit_as_it_was_keeps_its_hash():
    edit = Edit(case_id=1, prompt="The capital of {} is", subject="France", target_new="Lyon")
    assert set(recorded(edit)) == set(Edit.model_fields) - {"subject_at", "join"}
    assert {"join", "subject_at"} <= set(recorded(edit.model_copy(update={"join": "", "subject_at": 15})))


def test_an_edit_set_describes_where_it_comes_from():
    edits = EditSet((Edit(**PLAIN),) * 3, source="facts.jsonl", form="zsre", lines=(1, 2, 3), target_field="alt")
    assert edits.describe() == "read 3 edits: form zsre, target = alt"
    assert EditSet((edits[0],), ignored=("colour", "size")).describe() == "read 1 edit, ignored fields: colour, size"


def test_a_slice_tells_of_no_skipped_records():
    edits = EditSet((Edit(**PLAIN),) * 3, lines=(1, 3, 4), skipped=(Problem("is wrong", line=2),))
    assert edits[1:] == EditSet(edits.edits[1:], lines=(3, 4))


def test_importing_the_module_does_not_import_torch():
    code = "import sys, fastedit.records.edit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
