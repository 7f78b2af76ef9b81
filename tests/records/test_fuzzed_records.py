"""Randomly generated record files: each gives valid edits or one clear error, soon, in little memory."""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastedit.editor import Editor
from fastedit.records.check import check_edits
from fastedit.records.edit import EditSet, InvalidEdits
from fastedit.records.load import load_edits

SECONDS = 10
GIGABYTE = 2**20  # of the kilobytes in which ru_maxrss counts

TEXTS = (
    "", " ", "\0", "\x1b[2J", "\u202e", "\ufeff", "e\u0301", "é", "{}", "{}{}", "{0}", "a" * 100_000, "word " * 3000,
    "𝔘𝔫𝔦", "\ud800", "\r\n", "\u2028", "null", "The capital of France is", "<|endoftext|>", "'; DROP TABLE", "🏳️‍🌈" * 50,
)  # fmt: skip
NAMES = (
    "prompt", "subject", "target_new", "target_true", "ground_truth", "case_id", "locality", "portability", "src",
    "alt", "rephrase_prompts", "rephrase_prompt", "requested_rewrite", "locality_prompt", "locality_ground_truth",
    "answers", "paraphrase_prompts", "neighborhood_prompts", "generation_prompts", "questions", "loc", "loc_ans", "",
)  # fmt: skip


def value(chance: random.Random, depth: int = 0) -> Any:
    """Anything JSON can say."""
    kind = chance.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return chance.choice((None, True, False, 0, -1, 10**400, 1e308, float("nan"), float("inf"), 0.1))
    if kind <= 3:
        return chance.choice(TEXTS)
    if kind <= 5:
        return "".join(chr(chance.choice((chance.randrange(32), chance.randrange(0xD7FF)))) for _ in range(20))
    if kind == 6:
        return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(NAMES): value(chance, depth + 1) for _ in range(chance.randrange(5))}


def mutated(record: Any, chance: random.Random) -> Any:
    """A good record, unchanged or with fields and text added, removed or renamed."""
    record = json.loads(json.dumps(record))
    for _ in range(chance.randrange(3)):
        place, names = record, []
        while isinstance(place, (dict, list)) and place and (not names or chance.random() < 0.5):
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            names.append((place, chance.choice(keys)))
            place = names[-1][0][names[-1][1]]
        if not names:
            break
        holder, key = names[-1]
        what = chance.randrange(4)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[chance.choice(NAMES)] = holder.pop(key)
        elif what == 2 and isinstance(place, str):
            at = chance.randrange(len(place) + 1)
            holder[key] = place[:at] + chance.choice(TEXTS) + place[at:]
        else:
            holder[key] = value(chance)
    return record


def file_of_chance(good: list[Any], chance: random.Random, folder: Path) -> Path:
    records = [
        value(chance) if chance.random() < 0.2 else mutated(chance.choice(good), chance)
        for _ in range(chance.randrange(4))
    ]
    is_lines = chance.random() < 0.7
    text = "\n".join(map(json.dumps, records)) if is_lines else json.dumps(records)
    data = text.encode("utf-8", "surrogatepass")
    harm = chance.randrange(8)
    if harm == 0 and data:
        at = chance.randrange(len(data))
        data = data[:at] + bytes(chance.randrange(256) for _ in range(3)) + data[at:]
    elif harm == 1:
        data = data[: chance.randrange(len(data) + 1)]
    elif harm == 2 and chance.random() < 0.1:
        data = b"[" * 100_000 + data
    path = folder / f"records.json{'l' * is_lines}"
    path.write_bytes(data)
    return path


def judged(path: Path, editor: Editor) -> InvalidEdits | EditSet:
    """What becomes of a file, as `Editor.edit` would judge it."""
    try:
        edits = load_edits(path)
        limits = {"tokenizer": editor.tokenizer, "max_positions": editor.adapter.max_positions}
        check_edits(edits, 10, **limits, template_tokens=editor.config.templates.length + 1)
    except InvalidEdits as error:
        return error
    return edits


def fuzz(count: int, seed: int, editor: Editor, folder: Path) -> None:
    lines = (Path(__file__).resolve().parents[1] / "tiny" / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    good = [json.loads(line) for line in lines[:30]]
    good += [{"prompt": r["prompt"], "subject": r["subject"], "target_new": r["target_new"]} for r in good[:10]]
    chance, outcomes = random.Random(seed), []
    untouched = editor.weights.fingerprint()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        path = file_of_chance(good, chance, folder)
        started = time.process_time()
        outcome = judged(path, editor)
        outcomes.append(isinstance(outcome, EditSet))
        if isinstance(outcome, InvalidEdits):
            assert outcome.problems
            assert all(problem.message for problem in outcome.problems)
        assert 0 < len(str(outcome)) < 20_000
        assert time.process_time() - started < SECONDS, path.read_bytes()[:1000]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < GIGABYTE
    assert editor.weights.fingerprint() == untouched
    # Both kinds are there, or nothing was tried.
    assert 0.01 < sum(outcomes) / count < 0.9


def test_some_files_of_chance(fast_editor: Callable[..., Editor], tmp_path: Path) -> None:
    fuzz(500, 1, fast_editor(), tmp_path)


@pytest.mark.slow
def test_ten_thousand_files_of_chance(fast_editor: Callable[..., Editor], tmp_path: Path) -> None:
    fuzz(10_000, 2, fast_editor(), tmp_path)
