"""What is wrong with a record of each form is told by its place in the record; what is optional may be missing."""

import copy
import json

import pytest

from fastedit.records.edit import InvalidEdits
from fastedit.records.forms import READERS
from fastedit.records.load import load_edits

REWRITE = {"prompt": "The capital of {} is", "subject": "Peru", "target_new": {"str": "Oslo"}}
QUESTION = "What is the capital of Peru?"

# No form asks for more than this.
SMALLEST = {
    "plain": {"prompt": "The capital of Peru is", "subject": "Peru", "target_new": "Oslo"},
    "counterfact-flat": {"prompt": "Peru's", "subject": "Peru", "target_new": "Oslo", "ground_truth": None},
    "requests": REWRITE,
    "counterfact": {"requested_rewrite": REWRITE},
    "zsre-memit": {
        "requested_rewrite": REWRITE,
        "neighborhood_prompts": [{"prompt": "Chile lies in", "target": " So"}],
    },
    "mquake": {"requested_rewrite": [REWRITE, {**REWRITE, "subject": "Chile"}]},
    "zsre": {"src": QUESTION, "subject": "Peru", "answers": ["Lima"], "alt": "Oslo"},
    "zsre-ultraedit": {"src": QUESTION, "subject": "Peru", "ans": "Oslo"},
    "wikibigedit": {"update": QUESTION, "subject": "Peru", "ans": "Oslo"},
    "ultraeditbench": {"prompt": QUESTION, "subject": "Peru", "ans": "Oslo"},
    "knowedit": {"prompt": QUESTION, "subject": "Peru", "target_new": "Oslo", "locality": {}},
    "pyfastedit": {"prompt": "The capital of {} is", "subject": "Peru", "target": "Oslo"},
    "uniedit": {"requests": [{"prompt": "The capital of {} is", "subject": "Peru", "target_new": "Oslo"}]},
    "wikibio": {"concept": "lake titicaca", "text": "About lake titicaca.", "labels": "It is large."},
}

# form: (place, what is put there (... takes it away), the field that is blamed, what is said of it)
WRONG = [
    ("counterfact-flat", ["rephrase_prompt"], ["a", 5], "rephrase_prompt[1]", "must be a string, got 5"),
    ("requests", ["target_new", "str"], ..., "target_new.str", "is missing"),
    ("requests", ["target_new", "str"], 5, "target_new.str", "must be a string, got 5"),
    ("requests", ["target_true"], "Lima", "target_true", "must be an object, got 'Lima'"),
    ("requests", ["relation"], "P36", "relation", "did you mean 'relation_id'?"),
    ("counterfact", ["requested_rewrite", "subject"], ..., "requested_rewrite.subject", "is missing; methods that"),
    ("counterfact", ["requested_rewrite", "prompt"], "It is", "requested_rewrite.subject", "does not occur in the"),
    ("counterfact", ["requested_rewrite", "target_new"], "Oslo", "requested_rewrite.target_new", "must be an object"),
    ("counterfact", ["requested_rewrite"], "Peru", "requested_rewrite", "must be an object, got 'Peru'"),
    ("counterfact", ["paraphrase_prompts"], ["a", 7], "paraphrase_prompts[1]", "must be a string, got 7"),
    ("counterfact", ["generation_prompts"], 7, "generation_prompts", "must be a list, got 7"),
    ("counterfact", ["neighborhood_prompts"], "a", "neighborhood_prompts", "must be a list, got 'a'"),
    ("counterfact", ["neighborhood_prompts"], ["a", 7], "neighborhood_prompts[1]", "must be a string, got 7"),
    ("counterfact", ["paraphrase_prompt"], ["a"], "paraphrase_prompt", "did you mean 'paraphrase_prompts'?"),
    (
        "zsre-memit",
        ["neighborhood_prompts", 0, "target"],
        7,
        "neighborhood_prompts[0].target",
        "must be a string, got 7",
    ),
    ("zsre-memit", ["neighborhood_prompts", 0, "prompt"], ..., "neighborhood_prompts[0].prompt", "is missing"),
    ("mquake", ["requested_rewrite"], [], "requested_rewrite", "must hold at least one rewrite"),
    ("mquake", ["requested_rewrite", 1, "prompt"], "", "requested_rewrite[1].prompt", "must not be empty"),
    ("mquake", ["requested_rewrite", 0], "x", "requested_rewrite[0]", "must be an object, got 'x'"),
    ("mquake", ["requested_rewrite", 0, "question"], 7, "requested_rewrite[0].question", "must be a list, got 7"),
    ("mquake", ["questions"], ["Which?", 7], "questions[1]", "must be a string, got 7"),
    ("mquake", ["new_single_hops"], [{"answer": "Oslo"}], "new_single_hops[0].question", "is missing"),
    ("zsre", ["src"], "What is it?", "subject", "'Peru' does not occur in the prompt 'What is it?'"),
    ("zsre", ["answers"], [], "answers[0]", "is missing"),
    ("zsre", ["answers"], "Lima", "answers", "must be a list, got 'Lima'"),
    ("zsre", ["loc_ans"], "Quito", "loc", "is missing"),
    ("zsre", ["rephrse"], "x", "rephrse", "did you mean 'rephrase'?"),
    ("zsre", ["target_new"], "x", "target_new", "is what form knowedit edits towards, and unknown to form zsre"),
    ("zsre-ultraedit", ["subject"], ..., "subject", "is missing; methods that locate a fact before they edit it need"),
    ("zsre-ultraedit", ["ans"], "", "ans", "must not be empty"),
    ("wikibigedit", ["subject"], None, "subject", "must be a string, got None"),
    ("wikibigedit", ["mhop"], 7, "mhop", "must be a string, got 7"),
    ("wikibigedit", ["mhop_ans"], "Norway", "mhop", "is missing"),
    ("wikibigedit", ["ans"], ..., "ans", "is missing"),
    ("ultraeditbench", ["subject"], "Chile", "subject", "'Chile' does not occur in the prompt"),
    ("ultraeditbench", ["rephrase_prompt"], 7, "rephrase_prompt", "must be a list, got 7"),
    ("knowedit", ["locality"], [1], "locality", "must be an object of groups, got [1]"),
    ("knowedit", ["locality"], {"Near": "x"}, "locality.Near", "must be a list, got 'x'"),
    ("knowedit", ["locality"], {"Near": ["x"]}, "locality.Near[0]", "must be an object, got 'x'"),
    ("knowedit", ["locality"], {"Near": [{"prompt": 7}]}, "locality.Near[0].prompt", "must be a string, got 7"),
    (
        *("knowedit", ["portability"], {"Hop": [{"prompt": "a"}, {"prompt": "b", "ground_truth": [["c"], [7]]}]}),
        *("portability.Hop[1].ground_truth", "must be a string, got 7"),
    ),
    (
        *("knowedit", ["portability"], {"Hop": {"prompt": ["a", "b"], "ground_truth": ["c"]}}),
        *("portability.Hop.ground_truth", "must hold one entry for each of the 2 prompts, got ['c']"),
    ),
    ("wikibio", ["concept"], "Lake Titicaca", "concept", "upper and lower case differ, the prompt has 'lake titicaca'"),
    ("wikibio", ["labels"], ..., "labels", "is missing"),
    ("pyfastedit", ["target"], ..., "target", "is missing"),
    ("pyfastedit", ["queries"], [7], "queries[0]", "must be a string, got 7"),
    ("pyfastedit", ["query"], "x", "query", "did you mean 'queries'?"),
    ("pyfastedit", ["subject"], ..., "subject", "has a {} for it"),
    ("uniedit", ["requests"], [], "requests", "must hold at least one request"),
    ("uniedit", ["requests", 0, "target_new"], ..., "requests[0].target_new", "is missing"),
    ("uniedit", ["locality"], {"a": [{"prompt": 7}]}, "locality.a[0].prompt", "must be a string, got 7"),
    ("uniedit", ["generality"], {"a": [{"target": "x"}]}, "generality.a[0].prompt", "is missing"),
]


def changed(record, path, value):
    """A copy of the record with another value at a place; `...` takes the place away."""
    inner = record = copy.deepcopy(record)
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return record


@pytest.fixture
def read(tmp_path):
    """Edits of records, through a file."""

    def through_file(*records, **options):
        path = tmp_path / "facts.jsonl"
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        return load_edits(path, **options)

    return through_file


@pytest.mark.parametrize("form", SMALLEST)
def test_all_else_is_optional(read, form):
    edits = read(SMALLEST[form])
    assert edits.form == form
    assert all(edit.target_new and not edit.rephrase_prompts and not edit.portability for edit in edits)
    nulls = {name: None for name in next(r.fields for r in READERS if r.name == form) if name not in SMALLEST[form]}
    assert list(read({**SMALLEST[form], **nulls}, form=form)) == list(edits)


@pytest.mark.parametrize(
    ("form", "path", "value", "field", "message"), WRONG, ids=[f"{row[0]}-{number}" for number, row in enumerate(WRONG)]
)
def test_a_wrong_field_is_told_by_its_place(read, form, path, value, field, message):
    wrong = {**changed(SMALLEST[form], path, value), "case_id": 17}
    with pytest.raises(InvalidEdits) as caught:
        read(SMALLEST[form], wrong, form=form)
    (problem,) = caught.value.problems
    assert (problem.line, problem.case_id, problem.field) == (2, 17, field)
    assert message in problem.message
    kept = read(SMALLEST[form], wrong, form=form, on_invalid="skip")
    assert list(kept) == list(read(SMALLEST[form]))
    assert kept.skipped == (problem,)


def test_every_form_has_wrong_records():
    assert {row[0] for row in WRONG} | {"plain"} == {reader.name for reader in READERS}


@pytest.mark.parametrize(
    ("form", "more", "forms"),
    [
        ("zsre", {"ans": "Oslo"}, "zsre or zsre-ultraedit"),
        ("plain", {"ans": "Oslo"}, "plain or ultraeditbench"),
        ("wikibigedit", {"src": QUESTION}, "zsre-ultraedit or wikibigedit"),
        ("counterfact", {"update": QUESTION}, "counterfact or wikibigedit"),
    ],
)
def test_a_record_that_could_have_two_forms_names_both(read, form, more, forms):
    with pytest.raises(InvalidEdits) as caught:
        read({**SMALLEST[form], **more})
    (problem,) = caught.value.problems
    assert problem.message == f"could be of form {forms}; say which with form"


def test_all_that_is_wrong_with_a_record_is_told_at_once(read):
    record = {"case_id": 1.5, "requested_rewrite": [{}, {**REWRITE, "target_new": {"str": ""}}], "question": ["Why?"]}
    with pytest.raises(InvalidEdits) as caught:
        read(record)
    assert [problem.field for problem in caught.value.problems] == [
        *("question", "case_id"),
        *(f"requested_rewrite[0].{name}" for name in ("subject", "prompt", "target_new.str")),
        "requested_rewrite[1].target_new.str",
    ]


def test_a_field_that_fills_many_is_blamed_once(read):
    rewrite = {**REWRITE, "target_true": {"str": 7}}
    with pytest.raises(InvalidEdits) as caught:
        read({"requested_rewrite": rewrite, "neighborhood_prompts": ["Chile lies in", "Callao is"]})
    assert [problem.field for problem in caught.value.problems] == ["requested_rewrite.target_true.str"]


def test_a_record_of_no_known_form(read):
    with pytest.raises(InvalidEdits) as caught:
        read(SMALLEST["plain"], {"colour": "red"})
    (problem,) = caught.value.problems
    assert (problem.line, problem.case_id) == (2, 1)
    assert problem.message.startswith("has fields that no form (plain, counterfact-flat, requests, ")
    assert problem.message.endswith("knows: ['colour']")
