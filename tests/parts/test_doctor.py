"""What `doctor` finds, and what it calls a problem."""

import json
import platform
from pathlib import Path

import pytest
import torch

import fastedit.ops
from fastedit.doctor import Examination, examine, matmul_rate, owners_problem
from fastedit.loading import ALIASES


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
    assert found.versions["torch"] == torch.__version__
    assert found.facts["python"] == platform.python_version()
    assert found.facts["cache"] == str(tmp_path)
    assert all(f"model {alias}" in found.facts for alias in ALIASES)
    assert json.loads(json.dumps(found.to_dict()))["ops"] == found.ops


def test_the_text_shows_problems_and_what_is_not_installed():
    sick = Examination({"triton": None, "torch": "2.9"}, {"python": "3.11"}, {"masked_gram": "torch"}, ["two owners"])
    lines = str(sick).splitlines()
    assert [line.split() for line in lines] == [
        ["triton", "not", "installed"],
        ["torch", "2.9"],
        ["python", "3.11"],
        ["op", "masked_gram", "torch"],
        ["PROBLEM:", "two", "owners"],
    ]
    assert str(Examination({}, {}, {})) == "no problems found"


def test_a_rate_is_measured():
    assert 0 < matmul_rate(64, 2) < float("inf")
