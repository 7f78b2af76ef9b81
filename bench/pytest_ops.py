"""The settings of run.py under pytest-benchmark: `make bench`, or with its own options

    python -m pytest bench/pytest_ops.py -o pythonpath=bench -k "masked_gram and smollm2"

Times every backend of this machine and the first plain torch form, with warm caches, and stores nothing. The tests of
the ops do not run first; `run.py` runs them, and its rows are the ones that count.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from measure import SIZES, available_bytes
from run import TIMED, contestants

from fastedit.ops._dispatch import BackendUnavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def name_of(op, at):
    return f"{op} {at} {at.dtype}".replace("torch.", "")


SETTINGS = [
    pytest.param(module, at, id=name_of(op, at).replace(" ", "-"))
    for op in TIMED
    for module in (importlib.import_module(op),)
    for at in module.sweep(list(SIZES), DEVICE)
]


@pytest.fixture(scope="module")
def given(module, at):
    if module.memory(at) > available_bytes(DEVICE):
        pytest.skip(f"needs up to {module.memory(at) / 2**30:.1f} GiB of free memory")
    return module.inputs(at, DEVICE)


@pytest.mark.parametrize(("module", "at"), SETTINGS, scope="module")
@pytest.mark.parametrize("name", ["plain torch", "torch", "cpp", "triton", "cuda"])
def test_speed(benchmark, module, at, given, name):
    by_name = {each.name: each.call for each in contestants(module, given)}
    call = by_name.get(next(iter(module.PLAIN)) if name == "plain torch" else name)
    if call is None:
        pytest.skip(f"{module.__name__} has no {name} kernel")

    def once():
        with torch.no_grad():
            call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    try:
        once()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    benchmark.group = name_of(module.__name__, at)
    benchmark(once)
