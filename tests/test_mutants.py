"""Small faults put into the ops and the Triton kernels, one at a time: the tests of the op have to notice each.

A seeded sample of all mutants is run, every one in a process of its own on a copy of the tree. Those that no test can
notice are listed with the reason in mutants_that_survive.txt. With MUTANTS=200 in the environment more are drawn; with
MUTANTS_SEED=7 others are.

mutmut and cosmic-ray bring a configuration, a cache and a report of their own and do not know that the kernels are
installed under another name; this takes a hundred lines of the standard library.
"""

from __future__ import annotations

import ast
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SURVIVORS = Path(__file__).with_name("mutants_that_survive.txt")
FOLDERS = ("fastedit/ops", "kernels/triton")
OTHER = {"_check": "check", "_dispatch": "dispatch"}
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add}
MUTANTS = int(os.environ.get("MUTANTS", "16"))
SEED = int(os.environ.get("MUTANTS_SEED", "1"))


class Mutant(NamedTuple):
    """A fault in a file: its function, its line (not its number, which does not last), and the part that is changed."""

    path: str
    function: str
    line: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path} {self.function}: {self.line} | {self.before} -> {self.after}"


def faults(function: ast.FunctionDef) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """(part of a function, what takes its place)."""
    # Before Python 3.12 what stands in an f-string has no place in the file.
    hidden = {id(part) for node in ast.walk(function) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in (node for statement in function.body for node in ast.walk(statement)):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
            new = ast.Compare(node.left, [COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
            yield node, f"({ast.unparse(new)})"
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            yield node, f"({ast.unparse(ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right))})"
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, repr(node.value + 1)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, "None"


def mutants(path: Path) -> Iterator[tuple[Mutant, str]]:
    """Every mutant of a file with the text of the whole file."""
    text = path.read_text(encoding="utf-8")
    lines = text.encode().splitlines(keepends=True)
    before = [0, *accumulate(map(len, lines))]
    for function in ast.walk(ast.parse(text)):
        # What a kernel is launched with decides speed alone.
        if not isinstance(function, ast.FunctionDef) or function.name in ("config", "worth", "not_worth"):
            continue
        for node, new in faults(function):
            first = before[node.lineno - 1] + node.col_offset
            last = before[node.end_lineno - 1] + node.end_col_offset
            line = lines[node.lineno - 1].decode().strip()
            mutant = Mutant(path.relative_to(ROOT).as_posix(), function.name, line, ast.unparse(node), new)
            yield mutant, (text.encode()[:first] + new.encode() + text.encode()[last:]).decode()


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")


def judges_of(path: str) -> list[str]:
    """The arguments of pytest for the tests that judge a file."""
    stem = Path(path).stem
    if stem == "_launch":
        return [
            "tests/ops/test_gram_update.py",
            "tests/ops/test_apply_delta.py",
            "tests/ops/test_check.py",
            "-k",
            "triton",
        ]
    kind = "triton" if path.startswith("kernels") else "torch"
    name = OTHER.get(stem, stem)
    own = [f"tests/ops/test_{name}.py", "tests/ops/test_check.py"]
    own += ["tests/kernels/test_triton.py"] if kind == "triton" else []
    # Tests without a backend judge the checks of the public functions.
    judged = f"not cpp and not triton and (check or dispatch or {name})" if kind == "torch" else f"triton and {name}"
    return [*own, "-k", f"({judged}) and not smollm2 and not million"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the tests of the ops need, laid out as it is installed."""
    copy = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("fastedit", "tests/ops"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    (copy / "tests/kernels").mkdir()
    shutil.copy(ROOT / "tests/kernels/test_triton.py", copy / "tests/kernels")
    shutil.copytree(ROOT / "kernels/triton", copy / "fastedit/kernels", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def run_tests(tree: Path, path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    environment = os.environ | {"PYTHONPATH": str(tree), "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*command, *judges_of(path)], cwd=tree, env=environment, capture_output=True, text=True, timeout=900
    )


def survives(tree: Path, mutant: Mutant, text: str) -> bool:
    target = tree / mutant.path.replace("kernels/triton", "fastedit/kernels")
    kept = target.read_text(encoding="utf-8")
    target.write_text(text, encoding="utf-8")
    try:
        return run_tests(tree, mutant.path).returncode == 0
    except subprocess.TimeoutExpired:
        # A loop that does not end is noticed.
        return False
    finally:
        target.write_text(kept, encoding="utf-8")


def listed() -> set[str]:
    """The mutants of the list. An indented line below one is the reason."""
    lines = SURVIVORS.read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith((" ", "#"))}


def drawn() -> list[tuple[Mutant, str]]:
    every = [pair for path in sources() for pair in mutants(path)]
    return random.Random(SEED).sample(every, min(MUTANTS, len(every)))


def test_the_list_names_mutants_that_there_are():
    every = {str(mutant) for path in sources() for mutant, _ in mutants(path)}
    assert listed() <= every


def test_a_mutant_is_the_file_with_one_fault():
    found = dict(mutants(ROOT / "fastedit/ops/_check.py"))
    wanted = ("largest >= size", "(largest > size)")
    (flipped,) = (mutant for mutant in found if (mutant.before, mutant.after) == wanted)
    assert flipped.function == "require_in_range"
    assert "largest > size" in found[flipped]
    assert "largest >= size" not in found[flipped]
    assert all(mutant.before != mutant.after for mutant in found)


@pytest.mark.slow
def test_every_mutant_is_noticed_or_listed(tree):
    # Else a broken copy of the tree would notice everything.
    for path in sorted({mutant.path for mutant, _ in drawn()}):
        whole = run_tests(tree, path)
        assert whole.returncode == 0, whole.stdout[-3000:]

    alive = [str(mutant) for mutant, text in drawn() if str(mutant) not in listed() and survives(tree, mutant, text)]
    assert alive == []
