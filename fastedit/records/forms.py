"""The published forms of edit records, each with a `Reader` that turns records into edits.

A new form needs a `Reader` in READERS, or in `load_edits(..., readers=...)`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from fastedit.records.draft import Draft, Path, Question, Record, is_blank
from fastedit.records.edit import Edit, InvalidEdits, Problem, show

# The true answer of every zsRE record that MEMIT's code writes: it is unknown.
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, repr=False)
class Reader:
    """Turns records of one form into edits.

    name: the name of the form
    matches: returns whether a record has this form
    to_edits: returns the edits of a record whose `target_new` is the given one of `target_fields`. It raises
        `InvalidEdits` or `ValueError` for a wrong record, and `KeyError` for a missing field
    target_fields: the fields that can become `target_new`, the usual one first
    fields: the fields that a record may have; empty = any
    is_open: whether other fields are ignored, unless their names look like one of `fields` misspelt. True for
        published data, which have further columns; False for records written by hand
    """

    name: str
    matches: Callable[[Record], bool]
    to_edits: Callable[[Record, str], Sequence[Edit]]
    target_fields: tuple[str, ...] = ("target_new",)
    fields: tuple[str, ...] = ()
    is_open: bool = False

    def __repr__(self) -> str:
        return f"Reader({self.name!r})"


_CASE: dict[str, Path] = {"case_id": ("case_id",)}
# zsRE's locality question.
_LOC = Question(("loc",), (("loc_ans",),))


def _flat(record: Record, target: str) -> list[Edit]:
    """One flat object, as EasyEdit has it."""
    draft = Draft(record)
    draft.take(_CASE | {"subject": ("subject",), "prompt": ("prompt",), "target_new": (target,), "join": ("join",)})
    draft.take({"target_true": ("ground_truth",), "rephrase_prompts": ("rephrase_prompt",)})
    draft.take_probes("locality", [Question(("locality_prompt",), (("locality_ground_truth",),))])
    return [draft.edit()]


def _pyfastedit(record: Record, target: str) -> list[Edit]:
    """The records of pyfastedit (hiyouga/FastEdit), whose queries are asked after the edit."""
    draft = Draft(record)
    draft.take(_CASE | {"subject": ("subject",), "prompt": ("prompt",), "target_new": (target,)})
    draft.take({"rephrase_prompts": ("queries",)})
    return [draft.edit()]


def _uniedit(record: Record, target: str) -> list[Edit]:
    """UniEdit: one edit per request. The questions belong to the last one, after which the whole record is new.

    Questions of generality that ask for the edit's target are other wordings of it, the others follow from it."""
    drafts = [Draft(record) for _ in Draft(record).entries("requests")]
    if not drafts:
        raise InvalidEdits([Problem("must hold at least one request", "requests")])

    for number, draft in enumerate(drafts):
        at: Path = ("requests", number)
        draft.take(_CASE | {name: (*at, name) for name in ("subject", "prompt", "target_new")})

    last = drafts[-1]
    last.take_probes("locality", list(_groups(last, "locality", "target")))
    last.take_probes("portability", list(_groups(last, "generality", "target")))

    edits = _all_edits(drafts)
    own = [probe for probe in edits[-1].portability if set(probe.answers) == {edits[-1].target_new}]
    others = tuple(probe for probe in edits[-1].portability if probe not in own)
    changes = {"rephrase_prompts": tuple(probe.prompt for probe in own), "portability": others}

    return [*edits[:-1], edits[-1].model_copy(update=changes)]


def _request(*at: str | int) -> dict[str, Path]:
    """Places in a request of MEMIT's code that begins at `at`."""
    return _CASE | {
        "subject": (*at, "subject"),
        "prompt": (*at, "prompt"),
        "target_new": (*at, "target_new", "str"),
        "target_true": (*at, "target_true", "str"),
    }


def _requests(record: Record, target: str) -> list[Edit]:
    """A request of MEMIT's code as a record of its own."""
    draft = Draft(record)
    draft.take(_request())

    return [draft.edit()]


_COUNTERFACT = _request("requested_rewrite") | {
    "rephrase_prompts": ("paraphrase_prompts",),
    "generation_prompts": ("generation_prompts",),
}


def _counterfact(record: Record, target: str) -> list[Edit]:
    """CounterFact, as MEMIT's code has it."""
    draft = Draft(record, lenient=True, trimmed=True, needs_subject=True)
    draft.take(_COUNTERFACT)

    # The right answer to a neighborhood prompt is the true answer of the record.
    name = "neighborhood_prompts"
    answers = (_COUNTERFACT["target_true"],)
    draft.take_probes("locality", [Question((name, i), answers) for i in draft.entries(name)])
    return [draft.edit()]


def _zsre_memit(record: Record, target: str) -> list[Edit]:
    """zsRE in the form of CounterFact, as MEMIT's code writes it."""
    name = "neighborhood_prompts"
    if question := _joined(record.get(name)):
        record = {**record, name: [question]}
    draft = Draft(record, lenient=True, trimmed=True, needs_subject=True)

    without = "target_true" if _true_answer(record) == END_OF_TEXT else None
    draft.take({field: path for field, path in _COUNTERFACT.items() if field != without})
    draft.take_probes("locality", [Question((name, i, "prompt"), ((name, i, "target"),)) for i in draft.entries(name)])
    return [draft.edit()]


def _true_answer(record: Record) -> object:
    """The true answer of a rewrite, None if there is none."""
    rewrite = record.get("requested_rewrite")
    true = rewrite.get("target_true") if isinstance(rewrite, dict) else None

    return true.get("str") if isinstance(true, dict) else None


def _joined(neighbours: object) -> dict[str, str] | None:
    """One question instead of neighbours that ask for the tokens of its answer one by one; None for other neighbours.

    The prompt of each continues the one before, so the last prompt and target together are the whole text. A token
    that is only part of a character was decoded to U+FFFD, which is not compared.
    """
    if not isinstance(neighbours, list) or not neighbours or not all(isinstance(part, dict) for part in neighbours):
        return None

    parts = [(part.get("prompt"), part.get("target")) for part in neighbours]
    if not all(isinstance(prompt, str) and isinstance(target, str) for prompt, target in parts):
        return None

    question = parts[0][0]
    text = "".join(parts[-1])
    if not all(text.startswith((prompt + target).rstrip("\ufffd")) for prompt, target in parts):
        return None

    return {"prompt": question, "target": text[len(question) :]}


def _zsre(record: Record, target: str) -> list[Edit]:
    """zsRE as it was published for editing."""
    draft = Draft(record, lenient=True, trimmed=True, needs_subject=True)
    draft.take(_CASE | {"subject": ("subject",), "prompt": ("src",), "rephrase_prompts": ("rephrase",)})

    # `answers` are true, `alt` is invented.
    answer: Path = ("answers", 0)
    draft.take({"target_new": ("alt",), "target_true": answer} if target == "alt" else {"target_new": answer})
    draft.take_probes("locality", [_LOC])
    return [draft.edit()]


def _lifelong(prompt: str, rephrase: str, record: Record, target: str) -> list[Edit]:
    """The data sets of UltraEdit, which differ in the names of the fields `prompt` and `rephrase`."""
    draft = Draft(record, lenient=True, trimmed=True, needs_subject=True)
    draft.take(_CASE | {"subject": ("subject",), "prompt": (prompt,), "target_new": (target,)})
    draft.take({"rephrase_prompts": (rephrase,)})
    draft.take_probes("locality", [_LOC])

    personas = [] if is_blank(record.get("personas")) else [Question(("personas",), ((target,),), "personas")]
    draft.take_probes("portability", [*personas, Question(("mhop",), (("mhop_ans",),), "mhop")])
    return [draft.edit()]


def _knowedit(subject: str, prompt: str, record: Record, target: str) -> list[Edit]:
    """The data sets of KnowEdit, which differ in the names of the fields `subject` and `prompt`."""
    draft = Draft(record, lenient=True)
    draft.take(_CASE | {"subject": (subject,), "prompt": (prompt,), "target_new": (target,)})

    is_list = isinstance(record.get("ground_truth"), list)
    draft.take({"target_true": ("ground_truth", 0) if is_list else ("ground_truth",)})
    draft.take({"rephrase_prompts": ("rephrase" if "rephrase" in record else "rephrase_prompt",)})

    for kind in ("locality", "portability"):
        draft.take_probes(kind, list(_groups(draft, kind)))
    return [draft.edit()]


def _groups(draft: Draft, kind: str, answer: str = "ground_truth") -> Iterator[Question]:
    """The questions of `locality` or `portability` in KnowEdit and in EasyEdit's requests.

    answer: the name of the field with the right answers

    KnowEdit has {group: [{prompt, ground_truth}]}, EasyEdit {group: {prompt: [..], ground_truth: [..]}}."""
    groups = draft.record.get(kind) or {}
    if not isinstance(groups, dict):
        draft.add_problem(f"must be an object of groups, got {show(groups)}", (kind,))
        return

    for group, members in groups.items():
        if not isinstance(members, dict):
            for i in draft.entries(kind, group):
                yield Question((kind, group, i, "prompt"), ((kind, group, i, answer),), group)
        elif not isinstance(members.get("prompt"), list):
            yield Question((kind, group, "prompt"), ((kind, group, answer),), group)
        elif len(draft.entries(kind, group, answer)) != len(members["prompt"]):
            message = f"must hold one entry for each of the {len(members['prompt'])} prompts"
            draft.add_problem(f"{message}, got {show(members.get(answer))}", (kind, group, answer))
        else:
            for i in draft.entries(kind, group, "prompt"):
                yield Question((kind, group, "prompt", i), ((kind, group, answer, i),), group)


def _mquake(record: Record, target: str) -> list[Edit]:
    """MQuAKE: one edit per rewrite. The questions belong to the last one, after which the whole chain is new."""
    drafts = [
        Draft(record, lenient=True, trimmed=True, needs_subject=True)
        for _ in Draft(record).entries("requested_rewrite")
    ]
    if not drafts:
        raise InvalidEdits([Problem("must hold at least one rewrite", "requested_rewrite")])

    for number, draft in enumerate(drafts):
        at: Path = ("requested_rewrite", number)
        draft.take(_request(*at) | {"rephrase_prompts": (*at, "question")})

    last = drafts[-1]
    answers = (("new_answer",), ("new_answer_alias",))
    multi_hop = [Question(("questions", i), answers, "multi_hop") for i in last.entries("questions")]
    name = "new_single_hops"
    single_hop = [
        Question((name, i, "question"), ((name, i, "answer"), (name, i, "answer_alias")), "single_hop")
        for i in last.entries(name)
    ]
    last.take_probes("portability", multi_hop + single_hop)

    return _all_edits(drafts)


def _all_edits(drafts: Sequence[Draft]) -> list[Edit]:
    """The edits of all drafts. Raises `InvalidEdits` with the problems of all, each once."""
    edits: list[Edit] = []
    problems: dict[Problem, None] = {}

    for draft in drafts:
        try:
            edits.append(draft.edit())
        except InvalidEdits as error:
            problems |= dict.fromkeys(error.problems)

    if problems:
        raise InvalidEdits(problems)

    return edits


# Fields by which `matches` tells the forms apart.
_FLAT = ("ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth")
_GROUPED = ("portability", "locality", "rephrase")


def _has(record: Record, *names: str) -> bool:
    """Whether a record has any of the fields."""
    return any(name in record for name in names)


def _is_bio(record: Record) -> bool:
    """Whether a record is one of KnowEdit's WikiBio."""
    return "concept" in record or ("text" in record and "labels" in record)


def _is_rewrite(kind: str, record: Record) -> bool:
    """Whether a record has the form `kind`, one of those with a `requested_rewrite`."""
    if "requested_rewrite" not in record:
        return False

    if isinstance(record["requested_rewrite"], list):
        return kind == "mquake"

    neighbours = record.get("neighborhood_prompts")
    by_token = isinstance(neighbours, list) and any(isinstance(neighbour, dict) for neighbour in neighbours)

    return kind == ("zsre-memit" if by_token or _true_answer(record) == END_OF_TEXT else "counterfact")


def _is_named(kind: str, record: Record) -> bool:
    """Whether a record has the form `kind`, one of those with `prompt`, `subject` and mostly `target_new`."""
    if _has(record, "requested_rewrite", "requests", "src", "update") or _is_bio(record):
        return False

    if "target" in record and "target_new" not in record:
        return kind == "pyfastedit"

    if "ans" in record and "target_new" not in record:
        return kind == "ultraeditbench"

    if isinstance(record.get("target_new"), dict):
        return kind == "requests"

    # With both target_new and ans two forms match, and the user has to choose one.
    if "ans" in record and kind == "ultraeditbench":
        return True

    form = "knowedit" if _has(record, *_GROUPED) else "counterfact-flat" if _has(record, *_FLAT) else "plain"

    return kind == form and _has(record, "prompt", "subject", "target_new", *_FLAT, *_GROUPED)


# Fields of the forms.
_BASIC = ("case_id", "prompt", "subject", "target_new")
_OWN = (*_BASIC, "join")
_LIFELONG = ("case_id", "subject", "ans", "loc", "loc_ans")
_KNOWEDIT = ("ground_truth", "rephrase", "rephrase_prompt", "portability", "locality", "cond")
_REWRITE = (
    *("case_id", "pararel_idx", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"),
    *("attribute_prompts", "generation_prompts"),
)

_REWRITE_TARGET = ("requested_rewrite.target_new.str",)

READERS = (
    # Plain is the flat form without the fields that are only measured.
    Reader("plain", partial(_is_named, "plain"), _flat, fields=(*_OWN, *_FLAT)),
    Reader("counterfact-flat", partial(_is_named, "counterfact-flat"), _flat, fields=(*_OWN, *_FLAT)),
    Reader(
        name="requests",
        matches=partial(_is_named, "requests"),
        to_edits=_requests,
        target_fields=("target_new.str",),
        fields=(*_BASIC, "target_true", "relation_id"),
    ),
    Reader("counterfact", partial(_is_rewrite, "counterfact"), _counterfact, _REWRITE_TARGET, _REWRITE, is_open=True),
    Reader("zsre-memit", partial(_is_rewrite, "zsre-memit"), _zsre_memit, _REWRITE_TARGET, _REWRITE, is_open=True),
    Reader(
        name="mquake",
        matches=partial(_is_rewrite, "mquake"),
        to_edits=_mquake,
        target_fields=("requested_rewrite[].target_new.str",),
        fields=(
            *("case_id", "requested_rewrite", "questions", "answer", "answer_alias", "new_answer", "new_answer_alias"),
            *("single_hops", "new_single_hops", "orig"),
        ),
        is_open=True,
    ),
    Reader(
        name="zsre",
        matches=lambda record: "src" in record and ("ans" not in record or _has(record, "answers", "alt")),
        to_edits=_zsre,
        target_fields=("answers[0]", "alt"),
        fields=("case_id", "subject", "src", "pred", "rephrase", "alt", "answers", "loc", "loc_ans", "cond"),
        is_open=True,
    ),
    Reader(
        name="zsre-ultraedit",
        matches=lambda record: "src" in record and "ans" in record,
        to_edits=partial(_lifelong, "src", "rephrase"),
        target_fields=("ans",),
        fields=(*_LIFELONG, "src", "rephrase"),
        is_open=True,
    ),
    Reader(
        name="wikibigedit",
        matches=lambda record: "update" in record,
        to_edits=partial(_lifelong, "update", "rephrase"),
        target_fields=("ans",),
        fields=(*_LIFELONG, "update", "rephrase", "personas", "mhop", "mhop_ans", "tag", "relation", "object"),
        is_open=True,
    ),
    Reader(
        name="ultraeditbench",
        matches=partial(_is_named, "ultraeditbench"),
        to_edits=partial(_lifelong, "prompt", "rephrase_prompt"),
        target_fields=("ans",),
        fields=(*_LIFELONG, "prompt", "rephrase_prompt"),
        is_open=True,
    ),
    Reader(
        name="knowedit",
        matches=partial(_is_named, "knowedit"),
        to_edits=partial(_knowedit, "subject", "prompt"),
        fields=(*_BASIC, *_KNOWEDIT),
        is_open=True,
    ),
    Reader(
        name="wikibio",
        matches=_is_bio,
        to_edits=partial(_knowedit, "concept", "text"),
        target_fields=("labels",),
        fields=("case_id", "concept", "text", "labels", *_KNOWEDIT),
        is_open=True,
    ),
    Reader(
        name="pyfastedit",
        matches=partial(_is_named, "pyfastedit"),
        to_edits=_pyfastedit,
        target_fields=("target",),
        fields=("case_id", "prompt", "subject", "target", "queries"),
    ),
    Reader(
        name="uniedit",
        matches=lambda record: "requests" in record,
        to_edits=_uniedit,
        target_fields=("requests[].target_new",),
        fields=("case_id", "requests", "generality", "locality"),
        is_open=True,
    ),
)
