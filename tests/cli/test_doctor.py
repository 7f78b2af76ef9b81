"""What `doctor` finds, and what it calls a problem."""

import json
import platform
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

import fastedit.cli.doctor
import fastedit.ops
from fastedit.cli.doctor import (
    Examination,
    build_record,
    command_problem,
    examine,
    matmul_rate,
    owners_problem,
    range_problems,
    transformers_problem,
    where_is,
)
from fastedit.model.load import ALIASES
from fastedit.ops import cpp


@pytest.mark.parametrize("owners", [[], ["fastedit-engine"], ["fastedit-engine", "fastedit-engine"]])
def test_one_owner_of_the_import_name_is_no_problem(owners):
    assert owners_problem(owners) == []


def test_a_command_that_was_installed_for_an_older_checkout_is_a_problem():
    def installed(value):
        return [EntryPoint("fastedit", value, "console_scripts")]

    assert command_problem([]) == []
    assert command_problem(installed("fastedit.cli.main:main")) == []
    for value in ("fastedit.cli:main", "fastedit.cli.nowhere:main"):
        [problem] = command_problem(installed(value))
        assert f"was installed for {value}, which is no command: install again" in problem


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
    monkeypatch.setattr(cpp, "missing", lambda: "fastedit._cpu was not compiled (fastedit doctor says why)")
    assert examine().ops["capture_keys"]["cpp"] == f"fastedit._cpu was not compiled: {wanted[0]}"
    assert "doctor" not in str(examine())


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Makes metadata of a distribution, as an installer leaves it, visible before all others."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, version, *lines):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        head = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}")
        (folder / "METADATA").write_text("\n".join([*head, *lines, ""]))

    return install


def test_releases_outside_the_metadata_s_ranges_are_problems(installed):
    assert range_problems("fastedit-engine") == []
    ranges = ("Requires-Dist: torch>=2.6", "Requires-Dist: fewer<2", "Requires-Dist: unknown_thing; extra == 'dev'")
    installed("theirs", "1.0", "Requires-Python: >=3.10", *ranges)
    installed("fewer", "1.9")
    assert range_problems("theirs") == []
    installed("others", "1.0", "Requires-Python: >=3.99", "Requires-Dist: fewer>=2,<3", "Requires-Dist: nobodys_thing")
    assert range_problems("others") == [
        f"Python is {platform.python_version()}, others needs >=3.99: make an environment with another Python",
        "fewer is 1.9, others needs <3,>=2: run pip install 'fewer<3,>=2'",
        "nobodys_thing is not installed, others needs it: run pip install 'nobodys_thing'",
    ]
    assert "not_there is not installed" in range_problems("not_there")[0]


def test_transformers_of_another_release_is_a_problem_that_names_the_range(installed):
    installed("transformers", "4.40.0", "Requires-Dist: tokenizers<0.20,>=0.19")
    said = str(examine())
    assert re.search(r"PROBLEM: transformers is 4\.40\.0, fastedit-engine needs \S*>=4\.57\S*: run pip install", said)
    assert re.search(r"PROBLEM: tokenizers is \S+, transformers needs <0\.20,>=0\.19: run pip install", said)


def test_a_package_that_breaks_transformers_is_told(monkeypatch):
    assert transformers_problem() == []
    monkeypatch.setitem(sys.modules, "transformers.models.llama.modeling_llama", None)
    [problem] = transformers_problem()
    assert "cannot make a model: " in problem
    assert "modeling_llama" in problem


def test_a_default_model_that_is_not_here_names_the_command_that_gets_it(monkeypatch, tmp_path):
    [alias] = ALIASES
    stored = tmp_path / "models" / alias
    stored.mkdir(parents=True)
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path))
    assert where_is(alias) == str(stored)
    stored.rmdir()
    monkeypatch.setattr("fastedit.model.load._package_folders", lambda package: [])
    assert where_is(alias).startswith(f"not here; get it with `{ALIASES[alias].install}`")


def test_a_rate_is_measured():
    assert 0 < matmul_rate(64, 2) < float("inf")
