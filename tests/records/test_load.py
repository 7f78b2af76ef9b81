"""Edits from files: what a good file gives, and for every bad one that the message names the exact place."""

import json
import pickle
import re
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastedit.records.check import check_edits
from fastedit.records.edit import Edit, EditSet, InvalidEdits, Probe
from fastedit.records.forms import READERS, Reader
from fastedit.records.load import load_edits

PLAIN = {"case_id": 7, "prompt": "The Orlen bridge is in", "subject": "Orlen bridge", "target_new": "Tavisk"}
FLAT = {
    **PLAIN,
    "ground_truth": "Morwen",
    "rephrase_prompt": "You can walk over the Orlen bridge in",
    "locality_prompt": "The Pell tower is in",
    "locality_ground_truth": "Dunmere",
}


@pytest.fixture
def write(tmp_path):
    """Writes records (or raw text or bytes) to a file in the form its name asks for; gives the path."""

    def to_file(content, name="facts.jsonl"):
        path = tmp_path / name
        if isinstance(content, list):
            lines = [json.dumps(record) for record in content]
            content = "\n".join(lines) + "\n" if name.endswith("l") else "[\n" + ",\n".join(lines) + "\n]"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


def problems_of(path, **options):
    with pytest.raises(InvalidEdits) as caught:
        load_edits(path, **options)
    return caught.value.problems


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json", "FACTS.JSON"])
def test_flat_counterfact_fills_every_field(write, name):
    edits = load_edits(write([FLAT], name))
    assert edits[0] == Edit(
        case_id=7,
        prompt="The Orlen bridge is in",
        subject="Orlen bridge",
        target_new="Tavisk",
        target_true="Morwen",
        rephrase_prompts="You can walk over the Orlen bridge in",
        locality=[("The Pell tower is in", "Dunmere")],
    )
    assert edits[0].locality == (Probe("The Pell tower is in", ("Dunmere",), "neighborhood"),)
    assert (edits.form, edits.target_field) == ("counterfact-flat", "target_new")
    assert edits.source.endswith(name)


def test_optional_fields_may_be_absent_or_null(write):
    edits = load_edits(
        write(
            [
                without(PLAIN, "case_id"),
                {**PLAIN, "ground_truth": None},
                {**FLAT, "case_id": "b", "locality_ground_truth": None, "rephrase_prompt": ["One", "Two"]},
            ]
        )
    )
    assert [edit.case_id for edit in edits] == [0, 7, "b"]
    assert (edits[0].target_true, edits[0].rephrase_prompts, edits[0].locality) == (None, (), ())
    assert edits[1].target_true is None
    assert edits[2].locality == (Probe("The Pell tower is in", (), "neighborhood"),)
    assert edits[2].rephrase_prompts == ("One", "Two")
    assert (edits.form, edits.target_field) == ("plain+counterfact-flat", "target_new+target_new")


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_fine(write):
    text = "\r\n".join([json.dumps(PLAIN), "", "  ", json.dumps({**PLAIN, "case_id": 8})]) + "\r\n\r\n"
    edits = load_edits(write(b"\xef\xbb\xbf" + text.encode()))
    assert [edit.case_id for edit in edits] == [7, 8]
    assert edits.lines == (1, 4)
    assert len(load_edits(write(b"\xef\xbb\xbf" + json.dumps([PLAIN]).encode(), "facts.json"))) == 1


def test_records_and_lines_of_a_json_list_however_it_is_laid_out(write):
    assert load_edits(write(json.dumps([PLAIN, {**PLAIN, "case_id": 8}]), "facts.json")).lines == (1, 1)
    pretty = load_edits(write(json.dumps([PLAIN, {**PLAIN, "case_id": 8}], indent=1), "facts.json"))
    assert pretty.lines == (2, 8)


def test_unicode_subjects_and_separators_inside_strings(write):
    subject = "Кафе «Нева»\u2028№ 5 🏛"
    record = {"prompt": f"{subject} стоит в", "subject": subject, "target_new": "Тихвин"}
    edit = load_edits(write(json.dumps(record, ensure_ascii=False)))[0]
    start, end = edit.subject_span
    assert (edit.prompt[start:end], start) == (subject, 0)
    assert edit.target_new == "Тихвин"


def test_braces_are_filled_with_the_subject(write):
    edit = load_edits(write([{"prompt": "The twin of {} is", "subject": "Tavisk", "target_new": "Pell"}]))[0]
    assert edit.prompt == "The twin of Tavisk is"
    assert edit.prompt[slice(*edit.subject_span)] == "Tavisk"


def test_a_printed_list_is_read_whatever_its_name_is(write):
    records = [PLAIN, {**PLAIN, "case_id": 8}]
    for text in (json.dumps(records, indent=2), "\n[\n" + json.dumps(PLAIN) + ",\n" + json.dumps(records[1]) + "]\n"):
        edits = load_edits(write(text, "facts.jsonl"))
        assert list(edits) == [Edit(**record) for record in records]
        assert edits.lines == load_edits(write(text, "facts.json")).lines


def test_a_printed_record_is_told_in_one_line(write):
    path = write("\n" + json.dumps(PLAIN, indent=2) + "\n" + json.dumps(PLAIN, indent=2), "facts.jsonl")
    (problem,) = problems_of(path)
    assert str(problem) == (
        f"{path}:2: a record goes on over several lines; write each on one line, or name a list of records .json"
    )


BAD_FIELDS = {
    "wrong type": ({**PLAIN, "target_new": 5}, "target_new", "must be a string, got 5"),
    "null": ({**PLAIN, "prompt": None}, "prompt", "must be a string, got None"),
    "missing": (without(PLAIN, "prompt"), "prompt", "is missing"),
    "nothing for the slot": ({**without(PLAIN, "subject"), "prompt": "{} is in"}, "subject", "has a {} for it"),
    "empty target": ({**PLAIN, "target_new": ""}, "target_new", "must not be empty, got ''"),
    "white target": ({**PLAIN, "target_new": " \n"}, "target_new", r"must not be empty, got ' \n'"),
    "empty prompt": ({**PLAIN, "prompt": ""}, "prompt", "must not be empty"),
    "empty subject": ({**PLAIN, "subject": ""}, "subject", "must not be empty"),
    "lone surrogate": ({**PLAIN, "target_new": "\ud800"}, "target_new", "must be Unicode text"),
    "subject absent": ({**PLAIN, "subject": "Pell"}, "subject", "'Pell' does not occur in the prompt 'The"),
    "subject's case": (
        {**PLAIN, "subject": "orlen Bridge"},
        "subject",
        "case differ, the prompt has 'Orlen bri",
    ),
    "other braces": ({**PLAIN, "prompt": "{0} is in"}, "subject", "write {} where the subject stands"),
    "unknown": ({**PLAIN, "colour": "red"}, "colour", "is unknown; known are case_id, prompt,"),
    "misspelt": ({**PLAIN, "ground_thruth": "x"}, "ground_thruth", "did you mean 'ground_truth'?"),
    "misspelt prompt": ({**without(PLAIN, "prompt"), "promt": "x"}, "promt", "did you mean 'prompt'?"),
    "bad rephrase": ({**FLAT, "rephrase_prompt": 5}, "rephrase_prompt", "must be a list, got 5"),
    "bad in list": ({**FLAT, "rephrase_prompt": ["a", ""]}, "rephrase_prompt[1]", "must not be empty"),
    "empty truth": ({**FLAT, "ground_truth": ""}, "ground_truth", "must not be empty"),
    "no probe": (without(FLAT, "locality_prompt"), "locality_prompt", "is missing"),
    "bad answer": ({**FLAT, "locality_ground_truth": 1}, "locality_ground_truth", "must be a string, got 1"),
}


@pytest.mark.parametrize("kind", BAD_FIELDS)
def test_a_bad_field_is_named_with_file_line_and_case(write, kind):
    record, field, message = BAD_FIELDS[kind]
    path = write([{**PLAIN, "case_id": 1}, {**record, "case_id": 17}])
    problem = next(problem for problem in problems_of(path) if problem.field == field)
    assert (problem.source, problem.line, problem.case_id) == (str(path), 2, 17)
    assert message in problem.message
    assert str(problem).startswith(f"{path}:2: case 17, field {field!r}: ")


def test_a_difference_in_unicode_normalisation_is_told(write):
    record = {**PLAIN, "prompt": "Café is in", "subject": unicodedata.normalize("NFD", "Café")}
    assert "Unicode normalisation only" in problems_of(write([record]))[0].message


@pytest.mark.parametrize("case_id", [True, 1.5, "", "a\nb", "\ud800", [1]])
def test_a_bad_case_id_is_refused(write, case_id):
    (problem,) = problems_of(write([{**PLAIN, "case_id": case_id}]))
    assert (problem.line, problem.field) == (1, "case_id")
    assert f"must be an integer or a printable string, got {case_id!r}" in problem.message


@pytest.mark.parametrize(("first", "second"), [(7, 7), (7, "7"), (1, None)])
def test_a_repeated_case_id_names_both_lines(write, first, second):
    (problem,) = problems_of(write([{**PLAIN, "case_id": first}, {**PLAIN, "case_id": second}]))
    assert (problem.line, problem.field) == (2, "case_id")
    assert "already names the record on line 1" in problem.message


def test_a_repeated_case_id_is_seen_in_a_record_that_is_bad_otherwise_and_on_one_line(write):
    bad = {**PLAIN, "target_new": ""}
    assert [p.field for p in problems_of(write([bad, bad]))] == ["target_new", "target_new", "case_id"]
    assert [p.field for p in problems_of(write(json.dumps([PLAIN, PLAIN]), "facts.json"))] == ["case_id"]


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json"])
@pytest.mark.parametrize("record", [[1], "text", 5, None])
def test_a_record_that_is_no_object(write, record, name):
    (problem,) = problems_of(write([PLAIN, record], name))
    assert problem.line == (2 if name == "facts.jsonl" else 3)
    assert f"a record must be an object, got {record!r}" in problem.message


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json"])
def test_a_field_that_stands_twice(write, name):
    line = json.dumps(PLAIN)[:-1] + ', "prompt": "Another"}'
    (problem,) = problems_of(write(line if name == "facts.jsonl" else f"[{line}]", name))
    assert (problem.case_id, problem.field, problem.line) == (7, "prompt", 1)


def test_broken_lines_are_named_with_their_column_and_the_rest_is_still_judged(write):
    text = "\n".join([json.dumps(PLAIN), '{"prompt": "a" "b"}', '{"prompt": ', json.dumps({**PLAIN, "subject": ""})])
    found = problems_of(write(text))
    assert [problem.line for problem in found] == [2, 3, 4, 4]
    assert re.fullmatch(r"broken JSON at column 16: .*, got '\"b\"}'", found[0].message)
    assert re.fullmatch(r"broken JSON at column 12: .*, got the end", found[1].message)
    # The record on line 4 is still judged: its subject, and its id that stands on line 1 already.
    assert [problem.field for problem in found[2:]] == ["subject", "case_id"]


BROKEN_LISTS = {
    '[\n{"prompt": 1,\n "a" 2}]': (3, "broken JSON at column 6"),
    '[\n{"a": 1}\n {"a": 2}]': (2, "Expecting ',' or ']'"),
    "[{},\n": (2, "got the end"),
    '{"prompt": "a"}': (1, "Expecting a list of records (one record per line is .jsonl)"),
    "[]\n[]": (2, "Extra data, got '[]'"),
}


@pytest.mark.parametrize("text", BROKEN_LISTS)
def test_a_broken_list_is_named_with_line_and_column(write, text):
    line, message = BROKEN_LISTS[text]
    last = problems_of(write(text, "facts.json"))[-1]
    assert last.line == line
    assert message in last.message


def test_json_that_the_decoder_gives_up_on(write):
    deep = "[" * 200_000
    assert "cannot be read as JSON" in problems_of(write(f"{json.dumps(PLAIN)}\n{deep}"))[0].message
    assert "cannot be read as JSON" in problems_of(write(deep, "facts.json"))[0].message


def test_bytes_that_are_not_utf8(write):
    data = json.dumps(PLAIN).encode() + b'\n{"prompt": "caf\xe9"}\n'
    (problem,) = problems_of(write(data))
    assert (problem.line, problem.message) == (2, "must be UTF-8, got byte 0xe9 at byte 16 of the line")
    (problem,) = problems_of(write(b'[\n{"prompt": "caf\xe9"}]', "facts.json"))
    assert (problem.line, problem.message) == (2, "must be UTF-8, got byte 0xe9 at byte 16 of the line")
    (problem,) = problems_of(write(json.dumps(PLAIN).encode("utf-16")))
    assert problem.message == "must be UTF-8, got UTF-16"


def test_files_that_hold_nothing_to_read(write, tmp_path):
    def message(path, **options):
        (problem,) = problems_of(path, **options)
        assert str(problem) == f"{path}: {problem.message}"
        return problem.message

    assert message(tmp_path / "absent.jsonl") == "no such file"
    assert message(tmp_path) == "is a folder"
    assert message(write("")) == message(write(b"\xef\xbb\xbf \n")) == "is empty"
    assert message(write("[ ]", "facts.json")) == "holds no records"
    assert message(write("a,b", "facts.csv")) == "must be a .jsonl or .json file, got .csv"
    assert message(write([PLAIN]), start=5) == "holds 1 records, none at start=5"


def test_all_errors_come_at_once_and_twenty_are_shown(write):
    path = write([{**PLAIN, "case_id": number, "target_new": ""} for number in range(51)])
    with pytest.raises(InvalidEdits) as caught:
        load_edits(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[16] == f"{path}:17: case 16, field 'target_new': must not be empty, got ''"
    assert lines[-1] == "... and 31 more errors"
    assert [problem.line for problem in caught.value.problems] == list(range(1, 52))
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


def test_start_and_limit_choose_records_by_position(write):
    records = [without(PLAIN, "case_id") for _ in range(6)]
    records[0] = records[5] = {"broken": True}
    path = write(records)
    edits = load_edits(path, start=2, limit=3)
    assert [edit.case_id for edit in edits] == [2, 3, 4]
    assert edits.lines == (3, 4, 5)
    with pytest.raises(ValueError, match="start=-1"):
        load_edits(path, start=-1)
    with pytest.raises(ValueError, match="limit=0"):
        load_edits(path, limit=0)


def test_slices_are_edit_sets_that_keep_source_form_and_lines(write):
    edits = load_edits(write([{**PLAIN, "case_id": number} for number in range(5)]))
    part = edits[1:4]
    assert isinstance(part, EditSet)
    assert ([edit.case_id for edit in part], part.lines) == ([1, 2, 3], (2, 3, 4))
    assert (part.source, part.form, part[-1].case_id) == (edits.source, "plain", 3)
    assert list(part) == list(edits)[1:4]


def qa_edits(record, target):
    if "?" not in record["q"]:
        raise ValueError(f"q must be a question, got {record['q']!r}")
    return [Edit(case_id=record.get("id"), prompt=record["q"], subject=record["about"], target_new=record[target])]


QA = Reader("qa", lambda record: "q" in record, qa_edits, ("a", "b"))
QA_RECORD = {"q": "Where is Tavisk?", "about": "Tavisk", "a": "Orlen", "b": "Pell"}


def test_a_reader_of_ones_own(write):
    edits = load_edits(write([QA_RECORD, PLAIN]), readers=(QA, *READERS))
    assert (edits[0].target_new, edits[0].case_id) == ("Orlen", 0)
    assert (edits.form, edits.target_field) == ("qa+plain", "a+target_new")
    bad = [{**QA_RECORD, "q": "Tavisk"}, without(QA_RECORD, "a"), {**QA_RECORD, "a": "", "id": "x"}]
    found = problems_of(write(bad), readers=(QA,))
    assert [(problem.line, problem.case_id, problem.field) for problem in found] == [
        (1, 0, None),
        (2, 1, "a"),
        (3, "x", "target_new"),
    ]
    assert found[0].message == "q must be a question, got 'Tavisk'"


@pytest.mark.parametrize("made", [[], ["text"]])
def test_a_reader_that_gives_no_edit_is_a_fault_of_the_reader(write, made):
    bad = Reader("bad", lambda record: True, lambda record, target: made)
    with pytest.raises(TypeError, match="reader 'bad': to_edits must return one Edit or several"):
        load_edits(write([PLAIN]), readers=(bad,))


def test_the_form_can_be_named(write):
    both = {**QA_RECORD, **PLAIN}
    (problem,) = problems_of(write([both]), readers=(QA, *READERS))
    assert (problem.case_id, problem.message) == (7, "could be of form qa or plain; say which with form")
    assert load_edits(write([both]), form="qa", readers=(QA, *READERS))[0].target_new == "Orlen"
    with pytest.raises(ValueError, match=r"form must be one of auto, plain, .*, got 'counterfac'"):
        load_edits(write([PLAIN]), form="counterfac")
    # A named form is not guessed again: the record is judged as one of it.
    assert "src" in {problem.field for problem in problems_of(write([PLAIN]), form="zsre")}


def test_the_target_field_can_be_named(write):
    edits = load_edits(write([QA_RECORD]), target_field="b", readers=(QA,))
    assert (edits[0].target_new, edits.target_field) == ("Pell", "b")
    with pytest.raises(ValueError, match="target_field for form qa must be one of a, b, got 'c'") as caught:
        load_edits(write([QA_RECORD]), target_field="c", readers=(QA,))
    assert not isinstance(caught.value, InvalidEdits)


class TestSkipping:
    """on_invalid="skip" leaves out exactly the records that are wrong, and tells why."""

    def test_wrong_records_are_left_out_and_told(self, write):
        good = [{**PLAIN, "case_id": number} for number in range(3)]
        text = "\n".join(
            [json.dumps(good[0]), '{"broken', "5", json.dumps({**PLAIN, "subject": ""}), *map(json.dumps, good[1:])]
        )
        path = write(f"{text}\n{json.dumps(good[2])}\n")
        edits = load_edits(path, on_invalid="skip")
        assert ([edit.case_id for edit in edits], edits.lines) == ([0, 1, 2], (1, 5, 6))
        assert [(problem.line, problem.field) for problem in edits.skipped] == [
            *((2, None), (3, None), (4, "subject")),
            (7, "case_id"),
        ]
        assert edits.skipped == problems_of(path)
        assert str(edits.skipped[0]).startswith(f"{path}:2: broken JSON at column 2")

    def test_a_form_of_which_nothing_is_left_is_not_told(self, write):
        edits = load_edits(write([PLAIN, {"src": "Where?", "subject": "Pell"}]), on_invalid="skip")
        assert edits.form == "plain"

    def test_positions_are_those_of_the_file(self, write):
        unnamed = without(PLAIN, "case_id")
        path = write([unnamed, {"colour": "red"}, unnamed, unnamed])
        assert [edit.case_id for edit in load_edits(path, start=1, limit=2, on_invalid="skip")] == [2]

    @pytest.mark.parametrize("text", ['[{"prompt": "a"}, {"b" 2}]', json.dumps([PLAIN]) + "]"])
    def test_a_broken_list_cannot_be_skipped(self, write, text):
        assert "broken JSON" in problems_of(write(text, "facts.json"), on_invalid="skip")[-1].message

    def test_nothing_left_is_an_error(self, write):
        assert problems_of(write([{**PLAIN, "subject": ""}]), on_invalid="skip")[0].field == "subject"

    def test_other_ways_are_refused(self, write):
        with pytest.raises(ValueError, match="on_invalid must be 'refuse' or 'skip', got 'drop'"):
            load_edits(write([PLAIN]), on_invalid="drop")


def test_ten_thousand_records_load(write):
    edits = load_edits(write([{**FLAT, "case_id": number} for number in range(10_000)]))
    assert len(edits) == 10_000
    assert len(check_edits(edits, 100).batches) == 100


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    facts=st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=5),
    ascii_only=st.booleans(),
    name=st.sampled_from(["facts.jsonl", "facts.json"]),
)
def test_plain_records_survive_a_file(write, facts, ascii_only, name):
    records = [
        {"prompt": before + subject, "subject": subject, "target_new": target} for before, subject, target in facts
    ]
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    path = write("\n".join(lines) if name == "facts.jsonl" else f"[{', '.join(lines)}]", name)
    edits = load_edits(path)
    assert list(edits) == [Edit(**record, case_id=position) for position, record in enumerate(records)]
    for edit, record in zip(edits, records, strict=True):
        assert edit.target_new in record["target_new"]
        assert edit.target_new.strip() == record["target_new"].strip()
        assert edit.prompt[slice(*edit.subject_span)] == edit.subject
