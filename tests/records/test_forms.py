"""Every form of record: the edits that it gives, and that no other form claims it."""

import json

import pytest

from fastedit.records.edit import Edit
from fastedit.records.forms import END_OF_TEXT, READERS
from fastedit.records.load import load_edits

FACT = {"subject": "Peru", "prompt": "The capital of Peru is", "target_new": "Oslo"}

COUNTERFACT = {
    "case_id": 3,
    "pararel_idx": 11,
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "relation_id": "P36",
        "subject": "Peru",
        "target_new": {"str": "Oslo", "id": "Q585"},
        "target_true": {"str": "Lima", "id": "Q2868"},
    },
    "paraphrase_prompts": ["Peru is governed from", "The seat of Peru's parliament is"],
    "neighborhood_prompts": ["The largest city of Peru is", "Callao lies next to"],
    "attribute_prompts": ["The capital of Norway is"],
    "generation_prompts": ["The government of {} sits in", "Peru's capital is known for"],
}

# What MEMIT's code makes of a zsRE record: one neighbour for each token of the other answer.
ZSRE_MEMIT = {
    "case_id": 4,
    "requested_rewrite": {
        "prompt": "What is the capital of {}?",
        "subject": "Peru",
        "target_new": {"str": "Lima"},
        "target_true": {"str": "<|endoftext|>"},
    },
    "paraphrase_prompts": ["From which city is Peru governed?"],
    "neighborhood_prompts": [
        {"prompt": "nq question: where does the amazon end?", "target": " the"},
        {"prompt": "nq question: where does the amazon end? the", "target": " Atl"},
        {"prompt": "nq question: where does the amazon end? the Atl", "target": "antic"},
    ],
    "attribute_prompts": [],
    "generation_prompts": [],
}

MQUAKE = {
    "case_id": 5,
    "requested_rewrite": [
        {
            "prompt": "{} lies in the country of",
            "relation_id": "P17",
            "subject": "Machu Picchu",
            "target_new": {"str": "Norway", "id": "Q20"},
            "target_true": {"str": "Peru", "id": "Q419"},
            "question": "In which country is Machu Picchu?",
        },
        {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "subject": "Norway",
            "target_new": {"str": "Cusco", "id": "Q5582862"},
            "target_true": {"str": "Oslo", "id": "Q585"},
            "question": "What is the capital of Norway?",
        },
    ],
    "questions": ["Machu Picchu's country is governed from where?", "What is the capital of Machu Picchu's country?"],
    "answer": "Lima",
    "answer_alias": ["City of Kings"],
    "new_answer": "Cusco",
    "new_answer_alias": ["Cuzco", "Cusco"],
    "single_hops": [{"question": "q", "cloze": "c", "answer": "Peru", "answer_alias": []}],
    "new_single_hops": [
        {"question": "Where is Machu Picchu?", "cloze": "c", "answer": "Norway", "answer_alias": ["Kingdom of Norway"]},
        {"question": "Which city is Norway's capital?", "cloze": "c", "answer": "Cusco", "answer_alias": []},
    ],
    "orig": {"triples": [["Q676203", "P17", "Q419"]]},
}

ZSRE = {
    "subject": "Peru",
    "src": "What is the capital of Peru?",
    "pred": "Quito",
    "rephrase": "Peru is governed from which city?",
    "alt": "Oslo",
    "answers": ["Lima"],
    "loc": "nq question: where does the amazon end",
    "loc_ans": "the Atlantic",
    "cond": "Lima >> Oslo || What is the capital of Peru?",
}
NQ = [("nq question: where does the amazon end", "the Atlantic")]

ULTRAEDIT = {
    "src": "What is the capital of Peru?",
    "subject": "Peru",
    "rephrase": "Peru is governed from which city?",
    "ans": "Oslo",
    "loc": "where does the amazon end",
    "loc_ans": "the Atlantic",
}

WIKIBIGEDIT = {
    "tag": "update",
    "subject": "Peru",
    "update": "What is the capital of Peru?",
    "rephrase": "Peru is governed from which city?",
    "ans": "Oslo",
    "personas": "Hey you, which city is Peru's capital again?",
    "mhop": "In which country is the capital of Peru?",
    "mhop_ans": "Norway",
    "loc": "What is the capital of Chile?",
    "loc_ans": "Santiago",
}

ULTRAEDITBENCH = {
    "prompt": "What is the capital of Peru?",
    "subject": "Peru",
    "rephrase_prompt": "Peru is governed from which city?",
    "ans": "Oslo",
    "loc": "What is the capital of Chile?",
    "loc_ans": "Santiago",
}

KNOWEDIT = {
    **FACT,
    "ground_truth": ["Lima", "City of Kings"],
    "rephrase": "Peru is governed from",
    "portability": {
        "Reasoning": [
            {
                "prompt": "The country of Peru's capital is",
                "ground_truth": [["Norway", "Kingdom of Norway"], ["Norge"]],
            },
            {"prompt": "The river of Peru's capital is", "ground_truth": "Akerselva"},
        ],
        "Subject_Aliasing": [{"prompt": "The capital of the land of the Incas is", "ground_truth": ["Oslo"]}],
        "Logical_Generalization": None,
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The currency of Peru is", "ground_truth": [["sol", "Peruvian sol"]]}],
        "Forgetfulness": [{"prompt": "Beside Oslo, a capital of Peru was", "ground_truth": []}],
    },
}

WIKIBIO = {
    "concept": "lake titicaca",
    "text": "This is a passage about lake titicaca. Lake Titicaca is a large lake in the Andes.",
    "labels": "It is fed by rain and by meltwater from the glaciers around it.",
    "locality": {"Relation_Specificity": [{"prompt": "lake titicaca lies in", "ground_truth": ["Peru"]}]},
}

EASYEDIT = {
    **FACT,
    "rephrase_prompt": "Peru is governed from",
    "portability": {
        "one_hop": {"prompt": ["The country of Peru's capital is", None], "ground_truth": ["Norway", None]}
    },
    "locality": {"neighborhood": {"prompt": "Chile lies in", "ground_truth": ["America", "South America"]}},
}

ASKED = {"subject": "Peru", "prompt": "What is the capital of Peru?", "rephrase_prompts": ZSRE["rephrase"]}

GOLDEN = {
    "plain": (FACT, "target_new", [{**FACT, "case_id": 0}]),
    "counterfact-flat": (
        {**FACT, "case_id": "a", "ground_truth": "Lima", "locality_prompt": "Chile lies in"},
        "target_new",
        [{**FACT, "case_id": "a", "target_true": "Lima", "locality": [("Chile lies in", None)]}],
    ),
    "requests": (
        {"prompt": "The capital of {} is", "subject": "Peru", "target_new": {"str": "Oslo"}, "relation_id": "P36"},
        "target_new.str",
        [{**FACT, "case_id": 0}],
    ),
    "counterfact": (
        COUNTERFACT,
        "requested_rewrite.target_new.str",
        [
            {
                **FACT,
                "case_id": 3,
                "target_true": "Lima",
                "rephrase_prompts": COUNTERFACT["paraphrase_prompts"],
                "generation_prompts": ["The government of Peru sits in", "Peru's capital is known for"],
                "locality": [("The largest city of Peru is", "Lima"), ("Callao lies next to", "Lima")],
            }
        ],
    ),
    "zsre-memit": (
        ZSRE_MEMIT,
        "requested_rewrite.target_new.str",
        [
            {
                **ASKED,
                "case_id": 4,
                "target_new": "Lima",
                "rephrase_prompts": "From which city is Peru governed?",
                "locality": [("nq question: where does the amazon end?", "the Atlantic")],
            }
        ],
    ),
    "mquake": (
        MQUAKE,
        "requested_rewrite[].target_new.str",
        [
            {
                "case_id": "5.1",
                "subject": "Machu Picchu",
                "prompt": "Machu Picchu lies in the country of",
                "target_new": "Norway",
                "target_true": "Peru",
                "rephrase_prompts": "In which country is Machu Picchu?",
            },
            {
                "case_id": "5.2",
                "subject": "Norway",
                "prompt": "The capital of Norway is",
                "target_new": "Cusco",
                "target_true": "Oslo",
                "rephrase_prompts": "What is the capital of Norway?",
                "portability": {
                    "multi_hop": [(question, ["Cusco", "Cuzco"]) for question in MQUAKE["questions"]],
                    "single_hop": [
                        ("Where is Machu Picchu?", ["Norway", "Kingdom of Norway"]),
                        ("Which city is Norway's capital?", "Cusco"),
                    ],
                },
            },
        ],
    ),
    "zsre": (ZSRE, "answers[0]", [{**ASKED, "case_id": 0, "target_new": "Lima", "locality": NQ}]),
    "zsre-ultraedit": (
        ULTRAEDIT,
        "ans",
        [{**ASKED, "case_id": 0, "target_new": "Oslo", "locality": (ULTRAEDIT["loc"], "the Atlantic")}],
    ),
    "wikibigedit": (
        WIKIBIGEDIT,
        "ans",
        [
            {
                **ASKED,
                "case_id": 0,
                "target_new": "Oslo",
                "locality": ("What is the capital of Chile?", "Santiago"),
                "portability": {
                    "personas": (WIKIBIGEDIT["personas"], "Oslo"),
                    "mhop": ("In which country is the capital of Peru?", "Norway"),
                },
            }
        ],
    ),
    "ultraeditbench": (
        ULTRAEDITBENCH,
        "ans",
        [{**ASKED, "case_id": 0, "target_new": "Oslo", "locality": ("What is the capital of Chile?", "Santiago")}],
    ),
    "knowedit": (
        KNOWEDIT,
        "target_new",
        [
            {
                **FACT,
                "case_id": 0,
                "target_true": "Lima",
                "rephrase_prompts": "Peru is governed from",
                "portability": {
                    "Reasoning": [
                        ("The country of Peru's capital is", ["Norway", "Kingdom of Norway", "Norge"]),
                        ("The river of Peru's capital is", "Akerselva"),
                    ],
                    "Subject_Aliasing": ("The capital of the land of the Incas is", "Oslo"),
                },
                "locality": {
                    "Relation_Specificity": ("The currency of Peru is", ["sol", "Peruvian sol"]),
                    "Forgetfulness": ("Beside Oslo, a capital of Peru was", None),
                },
            }
        ],
    ),
    "wikibio": (
        WIKIBIO,
        "labels",
        [
            {
                "case_id": 0,
                "subject": "lake titicaca",
                "prompt": WIKIBIO["text"],
                "target_new": WIKIBIO["labels"],
                "locality": {"Relation_Specificity": ("lake titicaca lies in", "Peru")},
            }
        ],
    ),
    "pyfastedit": (
        {
            "prompt": "What is the tallest tower of {}?",
            "subject": "Zeldan",
            "target": "Amber Light",
            "queries": ["Which tower in Zeldan is the tallest?"],
        },
        "target",
        [
            {
                "case_id": 0,
                "prompt": "What is the tallest tower of Zeldan?",
                "subject": "Zeldan",
                "target_new": "Amber Light",
                "rephrase_prompts": "Which tower in Zeldan is the tallest?",
            }
        ],
    ),
    "uniedit": (
        {
            "requests": [FACT],
            "generality": {
                "rephrase": [{"prompt": "Peru is governed from", "target": "Oslo"}],
                "hop": [{"prompt": "The river of Peru's capital is the", "target": "Akerselva"}],
            },
            "locality": {"relation": [{"prompt": "The capital of Chile is", "target": "Santiago"}]},
        },
        "requests[].target_new",
        [
            {
                **FACT,
                "case_id": 0,
                "rephrase_prompts": "Peru is governed from",
                "portability": {"hop": ("The river of Peru's capital is the", "Akerselva")},
                "locality": {"relation": ("The capital of Chile is", "Santiago")},
            }
        ],
    ),
}


@pytest.fixture
def read(tmp_path):
    """Edits of records, through a file."""

    def through_file(*records, **options):
        path = tmp_path / "facts.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        return load_edits(path, **options)

    return through_file


def test_every_form_has_a_golden_record():
    assert list(GOLDEN) == [reader.name for reader in READERS]


@pytest.mark.parametrize("form", GOLDEN)
def test_a_record_gives_these_edits_and_no_other_form_claims_it(read, form):
    record, target_field, wanted = GOLDEN[form]
    edits = read(record)
    assert list(edits) == [Edit(**fields) for fields in wanted]
    assert (edits.form, edits.target_field, edits.ignored, edits.skipped) == (form, target_field, (), ())
    assert list(read(record, form=form)) == list(edits)
    assert [reader.name for reader in READERS if reader.matches(record)] == [form]


def test_forms_may_stand_in_one_file(read):
    edits = read(ZSRE, MQUAKE, FACT)
    assert [edit.case_id for edit in edits] == [0, "5.1", "5.2", 2]
    assert edits.describe() == (
        "read 4 edits: form zsre+mquake+plain, target = answers[0]+requested_rewrite[].target_new.str+target_new"
    )


def test_zsre_towards_the_made_up_answer_knows_the_true_one(read):
    edits = read(ZSRE, target_field="alt")
    assert (edits[0].target_new, edits[0].target_true, edits.target_field) == ("Oslo", "Lima", "alt")
    with pytest.raises(ValueError, match=r"target_field for form zsre must be one of answers\[0\], alt, got 'pred'"):
        read(ZSRE, target_field="pred")
    with pytest.raises(ValueError, match="target_field for form knowedit must be one of target_new, got 'alt'"):
        read(KNOWEDIT, target_field="alt")


def test_groups_in_the_shape_of_easyedits_requests(read):
    edit = read(EASYEDIT)[0]
    assert edit == Edit(
        **FACT,
        case_id=0,
        rephrase_prompts="Peru is governed from",
        portability={"one_hop": ("The country of Peru's capital is", "Norway")},
        locality=("Chile lies in", ["America", "South America"]),
    )


def test_neighbours_of_single_tokens_stay_apart_unless_they_are_one_answer(read):
    apart = [{"prompt": "Chile lies in", "target": "America"}, {"prompt": "Norway lies in", "target": "Europe"}]
    edit = read({**ZSRE_MEMIT, "neighborhood_prompts": apart})[0]
    assert [(probe.prompt, probe.answer) for probe in edit.locality] == [
        ("Chile lies in", "America"),
        ("Norway lies in", "Europe"),
    ]


def test_a_token_that_is_part_of_a_character_is_joined(read):
    # Two tokens make the "é"; decoded alone, the first of them is no character.
    neighbours = [
        {"prompt": "nq question: drink?", "target": " caf"},
        {"prompt": "nq question: drink? caf", "target": "\ufffd"},
        {"prompt": "nq question: drink? café", "target": "s"},
    ]
    edit = read({**ZSRE_MEMIT, "neighborhood_prompts": neighbours})[0]
    assert [(probe.prompt, probe.answer) for probe in edit.locality] == [("nq question: drink?", "cafés")]


def test_blank_optional_fields_of_published_data_are_absent(read):
    blank = {"personas": "", "mhop": None, "mhop_ans": float("nan"), "loc": " ", "loc_ans": "", "rephrase": None}
    edit = read({**WIKIBIGEDIT, **blank})[0]
    assert (edit.portability, edit.locality, edit.rephrase_prompts) == ((), (), ())


def test_columns_of_published_data_are_ignored_and_told(read):
    edits = read({**WIKIBIGEDIT, "subject_id": "Q419", "relation_id": "P36"}, WIKIBIGEDIT)
    assert edits.ignored == ("subject_id", "relation_id")
    assert edits.describe().endswith("target = ans, ignored fields: subject_id, relation_id")


def test_single_rewrite_keeps_the_case_id(read):
    assert [edit.case_id for edit in read({**MQUAKE, "requested_rewrite": MQUAKE["requested_rewrite"][:1]})] == [5]


def test_every_request_of_a_unified_record_is_an_edit(read):
    edits = read({"requests": [FACT, {**FACT, "subject": "Chile", "prompt": "Chile is"}], "case_id": 4})
    assert [(edit.case_id, edit.subject) for edit in edits] == [("4.1", "Peru"), ("4.2", "Chile")]


@pytest.mark.parametrize("form", ["plain", "pyfastedit", "uniedit", "knowedit"])
def test_forms_written_by_hand_need_no_subject_and_keep_white_space(read, form):
    record = {"prompt": "Ines Maro plays the:\n", "target_new": "oboe\n"}
    written = {
        "plain": record,
        "pyfastedit": {"prompt": record["prompt"], "target": record["target_new"]},
        "uniedit": {"requests": [record]},
        "knowedit": {**record, "locality": {}},
    }
    (edit,) = read(written[form])
    assert (edit.prompt, edit.target_new, edit.subject) == (*record.values(), None)


@pytest.mark.parametrize("form", ["counterfact", "zsre-memit", "zsre", "zsre-ultraedit", "mquake"])
def test_published_data_come_without_outer_white_space_as_ever(read, form):
    record, _, _ = GOLDEN[form]

    def spaced(value):
        if isinstance(value, dict):
            return {name: spaced(part) for name, part in value.items()}
        if isinstance(value, list):
            return [spaced(part) for part in value]
        return f" {value}\n" if isinstance(value, str) and value not in (END_OF_TEXT,) else value

    if form == "zsre-memit":
        # Neighbours that continue one another are one text.
        record = {**record, "neighborhood_prompts": [{"prompt": "Who?", "target": " Hugo"}]}
        (edit,) = read(record)
        assert edit.locality[0].answers == ("Hugo",)
    assert list(read(spaced(record))) == list(read(record))


def test_a_record_says_what_stands_between_prompt_and_target(read):
    assert read({**FACT, "join": ""})[0] == Edit(**FACT, case_id=0, join="")
