"""Dispatch: a backend requested by name runs or is refused with its reason; only the automatic choice falls back."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastedit.ops import _dispatch
from fastedit.ops.select_neurons import SelectNeurons, select_neurons

OPS = sorted(path.stem for path in Path(_dispatch.__file__).parent.glob("[a-z]*.py"))
SCORE = torch.tensor([3.0, 1.0, 2.0])


@pytest.fixture
def fake(monkeypatch):
    """A "cpp" backend of select_neurons whose answers are set by the test."""
    module = SimpleNamespace(supports=lambda *_: None, worth=lambda *_: None, select_neurons=lambda *_: "cpp")
    original = _dispatch.module_of
    monkeypatch.setattr(_dispatch, "module_of", lambda op, name: module if name == "cpp" else original(op, name))
    monkeypatch.setattr(_dispatch, "kinds", lambda op: ("cpp",))
    # Also where no compiler was found at install.
    monkeypatch.setattr(_dispatch, "present", lambda op: ("cpp",))
    monkeypatch.delenv("FASTEDIT_BACKEND", raising=False)
    return module


def test_the_first_backend_that_can_and_is_worth_it_runs(fake):
    assert select_neurons(SCORE, top_k=1) == "cpp"


@pytest.mark.parametrize("question", ["supports", "worth"])
def test_the_automatic_choice_falls_back_to_torch(fake, question):
    setattr(fake, question, lambda *_: "too small")
    assert select_neurons(SCORE, top_k=1).tolist() == [0]


def test_what_is_asked_for_is_used_even_if_it_is_not_worth_it(fake):
    fake.worth = lambda *_: "slower here"
    with _dispatch.backend("cpp"):
        assert select_neurons(SCORE, top_k=1) == "cpp"
        with _dispatch.backend("torch"):
            assert select_neurons(SCORE, top_k=1).tolist() == [0]
        assert select_neurons(SCORE, top_k=1) == "cpp"
    assert select_neurons(SCORE, top_k=1).tolist() == [0]


def test_what_is_asked_for_and_cannot_run_is_refused_with_its_reason(fake):
    fake.supports = lambda *_: "it was not compiled"
    refusal = "select_neurons: backend 'cpp' was requested, but it was not compiled; able: torch"
    with _dispatch.backend("cpp"), pytest.raises(_dispatch.BackendUnavailable, match=refusal):
        select_neurons(SCORE, top_k=1)


def test_a_tensor_without_memory_goes_to_torch_and_to_no_kernel(fake):
    with FakeTensorMode():
        score = torch.empty(3)
        assert _dispatch.automatic("select_neurons", SelectNeurons(score, 1)) == "torch"
        assert _dispatch.unsupported("select_neurons", "cpp", SelectNeurons(score, 1)) == (
            "kernels work on plain tensors, got a FakeTensor"
        )
    assert _dispatch.automatic("select_neurons", SelectNeurons(torch.nn.Parameter(SCORE), 1)) == "cpp"


def test_the_environment_asks_and_the_block_overrules_it(fake, monkeypatch):
    monkeypatch.setenv("FASTEDIT_BACKEND", "torch")
    assert select_neurons(SCORE, top_k=1).tolist() == [0]
    with _dispatch.backend("cpp"):
        assert select_neurons(SCORE, top_k=1) == "cpp"
    monkeypatch.setenv("FASTEDIT_BACKEND", "cpu")
    with pytest.raises(ValueError, match=r"backend must be one of cuda, triton, cpp.*, torch, got 'cpu'"):
        select_neurons(SCORE, top_k=1)


def test_a_backend_that_breaks_is_not_passed_over(fake):
    def broken(*_):
        raise ImportError("undefined symbol")

    fake.supports = broken
    with pytest.raises(ImportError, match="undefined symbol"):
        select_neurons(SCORE, top_k=1)


def test_a_module_of_a_kinds_package_makes_it_a_backend_of_the_op():
    kinds = _dispatch.kinds("gram_update")
    assert {"cuda", "triton", "cpp"} <= set(kinds)
    assert list(kinds) == [name for name in _dispatch.PACKAGES if name in kinds]
    assert "cpp" not in _dispatch.kinds("system_chain")
    assert _dispatch.kinds("no_such_op") == ()


@pytest.mark.parametrize("op", OPS)
def test_every_backend_has_what_the_dispatcher_calls(op):
    assert _dispatch.kinds(op)
    for name in _dispatch.kinds(op):
        module = _dispatch.module_of(op, name)
        assert callable(getattr(module, op))
        assert callable(module.supports)
        assert callable(module.worth)


def test_the_kinds_of_an_op_are_told_without_importing_a_backend():
    code = """
import sys
from fastedit.ops import _dispatch
before = set(sys.modules)
packages = set(_dispatch.PACKAGES.values())
assert not packages & before
_dispatch.kinds("select_neurons")
new = {name for name in set(sys.modules) - before if name.startswith(("fastedit", "triton"))}
assert new == packages, new
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
