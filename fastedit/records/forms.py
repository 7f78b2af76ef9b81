"""The forms of edit records that the field knows, each a `Reader` that makes edits of them.

A new form takes one more row in READERS, or in `load_edits(..., readers=...)`; nothing else knows the forms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from fastedit.records.draft import Draft, Path, Question, Record, is_blank
from fastedit.records.edit import Edit, InvalidEdits, Problem, show

# What stands in place of a true answer in the zsRE records that MEMIT's code makes.
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Reader:
    """Makes edits from one form of record.

    matches: whether a record has this form
    to_edits: the edits of a record, towards the given one of `target_fields`; raises `InvalidEdits` or `ValueError`
        for a wrong record, its `KeyError` means a missing field
    target_fields: the fields that can become `target_new`, the usual one first
    fields: the names a record may have; empty = any
    is_open: other names are ignored, unless they look like one of `fields` misspelt: so for published data, which
        carry columns of their own. What is written by hand is held to `fields`
    """

    name: str
    matches: Callable[[Record], bool]
    to_edits: Callable[[Record, str], Sequence[Edit]]
    target_fields: tuple[str, ...] = ("target_new",)
    fields: tuple[str, ...] = ()
    is_open: bool = False


_CASE: dict[str, Path] = {"case_id": ("case_id",)}
_LOC = Question(("loc",), (("loc_ans",),))


def _flat(record: Record, target: str) -> list[Edit]:
    draft = Draft(record)
    draft.take(_CASE | {"subject": ("subject",), "prompt": ("prompt",), "target_new": (target,)})
    draft.take({"target_true": ("ground_truth",), "rephrase_prompts": ("rephrase_prompt",)})
    draft.ask("locality", [Question(("locality_prompt",), (("locality_ground_truth",),))])
    return [draft.edit()]


def _request(*at: str | int) -> dict[str, Path]:
    """Places in what MEMIT's code calls a request."""
    return _CASE | {
        "subject": (*at, "subject"),
        "prompt": (*at, "prompt"),
        "target_new": (*at, "target_new", "str"),
        "target_true": (*at, "target_true", "str"),
    }


def _requests(record: Record, target: str) -> list[Edit]:
    draft = Draft(record)
    draft.take(_request())
    return [draft.edit()]


_COUNTERFACT = _request("requested_rewrite") | {
    "rephrase_prompts": ("paraphrase_prompts",),
    "generation_prompts": ("generation_prompts",),
}


def _counterfact(record: Record, target: str) -> list[Edit]:
    draft = Draft(record, lenient=True)
    draft.take(_COUNTERFACT)
    # A neighbour shares the true answer of the record it stands in.
    name, answers = "neighborhood_prompts", (_COUNTERFACT["target_true"],)
    draft.ask("locality", [Question((name, i), answers) for i in draft.entries(name)])
    return [draft.edit()]


def _zsre_memit(record: Record, target: str) -> list[Edit]:
    name = "neighborhood_prompts"
    if whole := _joined(record.get(name)):
        record = {**record, name: [whole]}
    draft = Draft(record, lenient=True)
    unwanted = "target_true" if _true_answer(record) == END_OF_TEXT else None
    draft.take({field: path for field, path in _COUNTERFACT.items() if field != unwanted})
    draft.ask("locality", [Question((name, i, "prompt"), ((name, i, "target"),)) for i in draft.entries(name)])
    return [draft.edit()]


def _true_answer(record: Record) -> object:
    rewrite = record.get("requested_rewrite")
    true = rewrite.get("target_true") if isinstance(rewrite, dict) else None
    return true.get("str") if isinstance(true, dict) else None


def _joined(neighbours: object) -> dict[str, str] | None:
    """The one question behind neighbours of which each asks for the next token of a single answer, or None.

    Each goes on where the one before ended, so the last holds the text of all. A token that is only a part of a
    character was decoded to U+FFFD, which is not compared.
    """
    if not isinstance(neighbours, list) or not neighbours or not all(isinstance(each, dict) for each in neighbours):
        return None
    parts = [(each.get("prompt"), each.get("target")) for each in neighbours]
    if not all(isinstance(prompt, str) and isinstance(target, str) for prompt, target in parts):
        return None
    question, text = parts[0][0], "".join(parts[-1])
    if not all(text.startswith((prompt + target).rstrip("\ufffd")) for prompt, target in parts):
        return None
    return {"prompt": question, "target": text[len(question) :]}


def _zsre(record: Record, target: str) -> list[Edit]:
    draft = Draft(record, lenient=True)
    draft.take(_CASE | {"subject": ("subject",), "prompt": ("src",), "rephrase_prompts": ("rephrase",)})
    # The answers are true, `alt` is made up.
    answer: Path = ("answers", 0)
    draft.take({"target_new": ("alt",), "target_true": answer} if target == "alt" else {"target_new": answer})
    draft.ask("locality", [_LOC])
    return [draft.edit()]


def _lifelong(prompt: str, rephrase: str, record: Record, target: str) -> list[Edit]:
    """The data sets of UltraEdit, which differ in the names of two fields."""
    draft = Draft(record, lenient=True)
    draft.take(_CASE | {"subject": ("subject",), "prompt": (prompt,), "target_new": (target,)})
    draft.take({"rephrase_prompts": (rephrase,)})
    draft.ask("locality", [_LOC])
    personas = [] if is_blank(record.get("personas")) else [Question(("personas",), ((target,),), "personas")]
    draft.ask("portability", [*personas, Question(("mhop",), (("mhop_ans",),), "mhop")])
    return [draft.edit()]


def _knowedit(subject: str, prompt: str, record: Record, target: str) -> list[Edit]:
    draft = Draft(record, lenient=True)
    draft.take(_CASE | {"subject": (subject,), "prompt": (prompt,), "target_new": (target,)})
    several = isinstance(record.get("ground_truth"), list)
    draft.take({"target_true": ("ground_truth", 0) if several else ("ground_truth",)})
    draft.take({"rephrase_prompts": ("rephrase" if "rephrase" in record else "rephrase_prompt",)})
    for kind in ("locality", "portability"):
        draft.ask(kind, list(_groups(draft, kind)))
    return [draft.edit()]


def _groups(draft: Draft, kind: str) -> Iterator[Question]:
    """Of {group: [{prompt, ground_truth}]}, and of EasyEdit's requests, {group: {prompt: [..], ground_truth: [..]}}."""
    groups = draft.record.get(kind) or {}
    if not isinstance(groups, dict):
        draft.blame(f"must be an object of groups, got {show(groups)}", (kind,))
        return
    for group, members in groups.items():
        if not isinstance(members, dict):
            for i in draft.entries(kind, group):
                yield Question((kind, group, i, "prompt"), ((kind, group, i, "ground_truth"),), group)
        elif not isinstance(members.get("prompt"), list):
            yield Question((kind, group, "prompt"), ((kind, group, "ground_truth"),), group)
        elif len(draft.entries(kind, group, "ground_truth")) != len(members["prompt"]):
            wrong = f"must hold one entry for each of the {len(members['prompt'])} prompts"
            draft.blame(f"{wrong}, got {show(members.get('ground_truth'))}", (kind, group, "ground_truth"))
        else:
            for i in draft.entries(kind, group, "prompt"):
                yield Question((kind, group, "prompt", i), ((kind, group, "ground_truth", i),), group)


def _mquake(record: Record, target: str) -> list[Edit]:
    """One edit for each rewrite; the last one carries the questions, since only then the chain of facts is whole."""
    drafts = [Draft(record, lenient=True) for _ in Draft(record).entries("requested_rewrite")]
    if not drafts:
        raise InvalidEdits([Problem("must hold at least one rewrite", "requested_rewrite")])
    for number, draft in enumerate(drafts):
        at: Path = ("requested_rewrite", number)
        draft.take(_request(*at) | {"rephrase_prompts": (*at, "question")})
    last, answers = drafts[-1], (("new_answer",), ("new_answer_alias",))
    chains = [Question(("questions", i), answers, "multi_hop") for i in last.entries("questions")]
    name = "new_single_hops"
    hops = [
        Question((name, i, "question"), ((name, i, "answer"), (name, i, "answer_alias")), "single_hop")
        for i in last.entries(name)
    ]
    last.ask("portability", chains + hops)
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


_FLAT = ("ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth")
_GROUPED = ("portability", "locality", "rephrase")


def _has(record: Record, *names: str) -> bool:
    return any(name in record for name in names)


def _is_bio(record: Record) -> bool:
    return "concept" in record or ("text" in record and "labels" in record)


def _is_rewrite(kind: str, record: Record) -> bool:
    """Which of the forms that hold a `requested_rewrite`."""
    if "requested_rewrite" not in record:
        return False
    if isinstance(record["requested_rewrite"], list):
        return kind == "mquake"
    neighbours = record.get("neighborhood_prompts")
    by_token = isinstance(neighbours, list) and any(isinstance(each, dict) for each in neighbours)
    return kind == ("zsre-memit" if by_token or _true_answer(record) == END_OF_TEXT else "counterfact")


def _is_named(kind: str, record: Record) -> bool:
    """Which of the forms that say prompt, subject and target_new."""
    if _has(record, "requested_rewrite", "src", "update") or _is_bio(record):
        return False
    if "ans" in record and "target_new" not in record:
        return kind == "ultraeditbench"
    if isinstance(record.get("target_new"), dict):
        return kind == "requests"
    form = "knowedit" if _has(record, *_GROUPED) else "counterfact-flat" if _has(record, *_FLAT) else "plain"
    # With both a target_new and an ans, it is for the user to say which is meant.
    both = "ans" in record and kind == "ultraeditbench"
    return both or (kind == form and _has(record, "prompt", "subject", "target_new", *_FLAT, *_GROUPED))


_BASIC = ("case_id", "prompt", "subject", "target_new")
_LIFELONG = ("case_id", "subject", "ans", "loc", "loc_ans")
_KNOWEDIT = ("ground_truth", "rephrase", "rephrase_prompt", "portability", "locality", "cond")
_REWRITE = (
    *("case_id", "pararel_idx", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"),
    *("attribute_prompts", "generation_prompts"),
)


_REWRITE_TARGET = ("requested_rewrite.target_new.str",)

READERS = (
    # Plain is the flat form without what can only be measured.
    Reader("plain", partial(_is_named, "plain"), _flat, fields=(*_BASIC, *_FLAT)),
    Reader("counterfact-flat", partial(_is_named, "counterfact-flat"), _flat, fields=(*_BASIC, *_FLAT)),
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
)
