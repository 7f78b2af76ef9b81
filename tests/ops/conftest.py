"""Runs the tests of an op once per backend that this machine has."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from fastedit.ops import _dispatch

# Read when Triton's kernels are imported. With a GPU they are compiled for it instead.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


OPS = sorted(path.stem for path in Path(_dispatch.__file__).parent.glob("[a-z]*.py"))
CALLS = [*OPS, "sparse_delta_grads"]


def absent(name: str) -> str | None:
    """Why backend `name` is not run here, None if it is."""
    if name == "cpp" and importlib.util.find_spec("fastedit._cpu") is None:
        return "fastedit._cpu was not compiled"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `backend` is run on every backend of its op, which is the file's name; one that asks for
    `call` too, for every public function of all ops on every backend of it.

    One that does not ask for `device` too makes its tensors on the CPU."""
    if "backend" in metafunc.fixturenames and "call" in metafunc.fixturenames:
        pairs = [(call, name) for call in CALLS for name in backends_of(call.removesuffix("_grads"))]
        ids = ["-".join(pair) for pair in pairs]
        parameters = [pytest.param(*pair, marks=on_gpu(pair[1])) for pair in pairs]
        metafunc.parametrize(("call", "backend"), parameters, indirect=["backend"], ids=ids)
    elif "call" in metafunc.fixturenames:
        metafunc.parametrize("call", CALLS)
    elif "backend" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
        names = [name for name in backends_of(op) if "device" in metafunc.fixturenames or not on_gpu(name)]
        parameters = [pytest.param(name, marks=on_gpu(name)) for name in names]
        metafunc.parametrize("backend", parameters, indirect=True)


def backends_of(op: str) -> list[str]:
    """The backends of an op that are run here. An op with parts passes a choice on to them."""
    kinds = _dispatch.PACKAGES if _dispatch.has_parts(op) else _dispatch.kinds(op)
    return [name for name in [*kinds, "torch"] if absent(name) is None]


def on_gpu(name: str) -> list[pytest.MarkDecorator]:
    """The mark of a backend that runs on a GPU."""
    return [pytest.mark.gpu] if name == "cuda" or (name == "triton" and torch.cuda.is_available()) else []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A GPU kernel that does not take a dtype skips the test, with its reason; the C++ kernels take them all."""
    try:
        return (yield)
    except _dispatch.BackendUnavailable as refusal:
        if getattr(item, "callspec", None) is None or item.callspec.params.get("backend") not in ("cuda", "triton"):
            raise
        pytest.skip(str(refusal))


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every op of the test runs on this backend, or the test fails."""
    with _dispatch.backend(request.param):
        yield request.param


@pytest.fixture
def device(backend: str) -> str:
    """Where the tensors of the test are made."""
    return "cuda" if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()) else "cpu"


@pytest.fixture
def nan_scratch() -> Iterator[None]:
    """Fresh tensors hold NaN (integers the largest number), so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
