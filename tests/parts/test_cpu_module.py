"""The compiled CPU module as a whole: instruction sets, threads, and what it is not to be asked for."""

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from fastedit.ops import _table, cpp
from fastedit.ops.apply_delta import apply_delta
from fastedit.ops.capture_keys import capture_keys
from fastedit.ops.gram_update import gram_update
from fastedit.ops.masked_gram import masked_gram
from fastedit.ops.select_neurons import select_neurons
from fastedit.ops.sparse_adam import AdamSettings, sparse_adam
from fastedit.testing import Case, Factory

pytestmark = pytest.mark.skipif(cpp.missing() is not None, reason="fastedit._cpu was not compiled")

WIDE = Case("wide", 9, 300, d_model=150, selected=170)


@pytest.fixture(autouse=True)
def on_cpp():
    with _table.backend("cpp"):
        yield


def everything(case=WIDE, dtype=torch.float32):
    """The results of every op on one case, as one list of tensors."""
    gate, up, weights, active = Factory(case, dtype).capture()
    keys, mass = capture_keys(gate, up, weights, "silu", active)
    score = Factory(case).score()
    chosen = [select_neurons(score, **rule) for rule in ({"top_k": 50}, {"reaching": 0.7}, {"within": 0.7})]
    gram = Factory(case).gram()
    systems = [masked_gram(*gram, dtype=kind) for kind in (torch.float32, torch.float64)]
    history = gram_update(gram.moment.clone(), gram.keys)
    weight, residual, solution, index, master = Factory(case, dtype).delta()
    apply_delta(weight, residual, solution, index, master)
    state = Factory(case).adam()
    sparse_adam(*state[:4], 3, AdamSettings(0.1), *state[4:])
    return [keys, mass, *chosen, *systems, history, weight, master, *state[:4]]


def same(left, right):
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_bit_is_the_same_whatever_the_number_of_threads(dtype, two_threads):
    double = everything(dtype=dtype)
    for count in (1, 3):
        torch.set_num_threads(count)
        assert same(everything(dtype=dtype), double)


def test_two_python_threads_at_once_get_what_one_gets(two_threads):
    wanted = everything()
    results = []

    def work():
        with _table.backend("cpp"):
            for _ in range(10):
                results.append(everything())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    assert all(same(result, wanted) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_comes_to_the_same_results(isa, dtype, monkeypatch):
    module = cpp.compiled()
    if module.ISAS.index(isa) > module.best_isa():
        pytest.skip(f"this processor has no {isa}")
    wanted = everything(dtype=dtype)
    monkeypatch.setenv("FASTEDIT_ISA", isa)
    assert module.ISAS[cpp.setting()[0]] == isa
    for found, expected in zip(everything(dtype=dtype), wanted, strict=True):
        if found.dtype == torch.int64:
            assert torch.equal(found, expected)
        tolerance = 2 * torch.finfo(found.dtype).eps if found.dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_half_precision_is_converted_as_torch_does_on_every_instruction_set(monkeypatch):
    module = cpp.compiled()
    for isa in module.ISAS[: module.best_isa() + 1]:
        monkeypatch.setenv("FASTEDIT_ISA", isa)
        for dtype in (torch.bfloat16, torch.float16):
            every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
            kept = every.clone()[None]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                apply_delta(kept, torch.zeros(1, 1), torch.zeros(2**16, 1))
            real = ~every.isnan()
            assert torch.equal(kept[0][real], every[real])
            assert kept[0][~real].isnan().all()
            master = torch.linspace(-2, 2, 4001)[None] * 1.0009765625 ** torch.arange(4001)
            master = torch.cat([master, torch.tensor([[1e-7, -3e-8, 6.1e-5, 65519.0, 65520.0, 1e-40]])], 1)
            rounded = torch.zeros_like(master, dtype=dtype)
            apply_delta(rounded, torch.zeros(1, 1), torch.zeros(master.shape[1], 1), None, master.clone())
            assert torch.equal(rounded, master.to(dtype))


def test_an_instruction_set_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("FASTEDIT_ISA", "avx9")
    with pytest.raises(ValueError, match=r"FASTEDIT_ISA must be one of baseline.* here, got 'avx9'"):
        select_neurons(torch.ones(3), top_k=1)
    with pytest.raises(ValueError, match="lacks the instruction set"):
        cpp.compiled().select_neurons(9, 1, 0, 0, 0, 0, 0.5, True, 0)
    with pytest.raises(ValueError, match="threads must be positive"):
        cpp.compiled().select_neurons(0, 0, 0, 0, 0, 0, 0.5, True, 0)


def test_what_the_kernels_cannot_take_is_refused_with_the_reason():
    with pytest.raises(_table.BackendUnavailable, match="capture_keys: .* takes .*float16, got torch.float64; able"):
        capture_keys(torch.ones(1, 1, 2).double(), None, torch.ones(1), "silu")
    with pytest.raises(_table.BackendUnavailable, match="run on the CPU, got a tensor on meta"):
        capture_keys(torch.ones(1, 1, 2, device="meta"), None, torch.ones(1), "silu")


def test_the_module_shares_the_threads_of_torch():
    """One OpenMP runtime in the process, and no thread of its own before the first kernel."""
    code = """
import torch, fastedit._cpu
maps = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libomp" in line}
print(len(maps))
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert run.stdout.strip() == "1"
