"""What `doctor` finds, and what it calls a problem."""

import json
import platform
from pathlib import Path

import pytest
import torch

import fastedit.cli.doctor
import fastedit.ops
from fastedit.cli.doctor import Examination, build_record, examine, matmul_rate, owners_problem
from fastedit.model.load import ALIASES
from fastedit.ops import cpp


@pytest.mark.parametrize("owners", [[], ["fastedit-engine"], ["fastedit-engine", "fastedit-engine"]])
def test_one_owner_of_the_import_name_is_no_problem(owners):
    assert owners_problem(owners) == []


def test_two_owners_are_one_problem_that_says_what_to_remove():
    [problem] = owners_problem(["pyfastedit", "fastedit-engine", "pyfastedit"])
    assert "2 distributions (fastedit-engine, pyfastedit)" in problem
    assert "pip uninstall pyfastedit," in problem


def test_an_examination_knows_every_op_and_this_installation(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path))
    found = examine()
    folder = Path(fastedit.ops.__file__).parent
    assert set(found.ops) == {path.stem for path in folder.glob("*.py") if not path.name.startswith("_")}
    assert all(list(backends) == ["cuda", "triton", "cpp", "torch"] for backends in found.ops.values())
    assert all(backends["torch"] is None for backends in found.ops.values())
    assert (found.ops["capture_keys"]["cpp"] is None) is found.facts["cpu kernels"].startswith("compiled, ")
    assert found.versions["torch"] == torch.__version__
    assert found.facts["python"] == platform.python_version()
    assert found.facts["cache"] == str(tmp_path)
    assert all(f"model {alias}" in found.facts for alias in ALIASES)
    assert json.loads(json.dumps(found.to_dict()))["ops"] == found.ops


OPS = {"masked_gram": {"cuda": "no GPU", "cpp": None, "torch": None}, "sparse_adam": {"torch": None}}


def test_the_text_shows_problems_and_what_is_not_installed():
    sick = Examination({"triton": None, "torch": "2.9"}, {"python": "3.11"}, OPS, ["two owners"])
    lines = str(sick).splitlines()
    assert [line.split() for line in lines] == [
        ["triton", "not", "installed"],
        ["torch", "2.9"],
        ["python", "3.11"],
        ["op", "masked_gram", "cpp,", "torch", "(cuda:", "no", "GPU)"],
        ["op", "sparse_adam", "torch"],
        ["PROBLEM:", "two", "owners"],
    ]
    assert str(Examination({}, {}, {})) == "no problems found"


@pytest.mark.parametrize("text", ["cpu: the C++ compiler: none\ncuda: no GPU\n", None])
def test_a_missing_compiler_is_told(monkeypatch, tmp_path, text):
    monkeypatch.setattr(fastedit, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(cpp, "missing", lambda: "it was not compiled")
    if text:
        (tmp_path / "_build.txt").write_text(text)
    wanted = ("the C++ compiler: none", "no GPU") if text else ("not built", "not built")
    assert build_record() == dict(zip(("cpu", "cuda"), wanted, strict=True))
    assert examine().ops["capture_keys"]["cpp"] == "it was not compiled"


def test_a_rate_is_measured():
    assert 0 < matmul_rate(64, 2) < float("inf")
