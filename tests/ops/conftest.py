"""Runs the tests of an op once per backend that this machine has."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator, Iterator

import pytest
import torch

from fastedit.ops import _dispatch

# Read when Triton's kernels are imported. With a GPU they are compiled for it instead.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def absent(name: str) -> str | None:
    """Why backend `name` is not run here, None if it is."""
    if name == "cpp" and importlib.util.find_spec("fastedit._cpu") is None:
        return "fastedit._cpu was not compiled"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `backend` is run on every backend of its op, which is the file's name.

    One that does not ask for `device` too makes its tensors on the CPU."""
    if "backend" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
        on_gpu = {"cuda", "triton"} if torch.cuda.is_available() else {"cuda"}
        kernels = [name for name in _dispatch.kinds(op) if "device" in metafunc.fixturenames or name not in on_gpu]
        marks = {name: [pytest.mark.gpu] for name in on_gpu}
        metafunc.parametrize(
            "backend",
            [pytest.param(name, marks=marks.get(name, [])) for name in [*kernels, "torch"] if absent(name) is None],
            indirect=True,
        )


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
