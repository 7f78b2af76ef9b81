"""The compiled CPU module as a whole: instruction sets, threads, and what it refuses."""

import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

from fastedit.ops import _dispatch, cpp
from fastedit.ops.apply_delta import apply_delta
from fastedit.ops.capture_keys import capture_keys
from fastedit.ops.gram_update import gram_update
from fastedit.ops.masked_gram import masked_gram
from fastedit.ops.select_neurons import select_neurons
from fastedit.ops.sparse_adam import AdamSettings, sparse_adam
from fastedit.testing import Case, Factory

ROOT = Path(__file__).resolve().parents[2]
WIDE = Case("wide", 9, 300, d_model=150, selected=170)


@pytest.fixture
def on_cpp():
    if cpp.missing() is not None:
        pytest.skip("fastedit._cpu was not compiled")
    with _dispatch.backend("cpp"):
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
def test_every_bit_is_the_same_whatever_the_number_of_threads(dtype, two_threads, on_cpp):
    double = everything(dtype=dtype)
    for count in (1, 3):
        torch.set_num_threads(count)
        assert same(everything(dtype=dtype), double)


def test_two_python_threads_at_once_get_what_one_gets(two_threads, on_cpp):
    wanted = everything()
    results = []

    def work():
        with _dispatch.backend("cpp"):
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
def test_every_instruction_set_comes_to_the_same_results(isa, dtype, monkeypatch, on_cpp):
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


def test_half_precision_is_converted_as_torch_does_on_every_instruction_set(monkeypatch, on_cpp):
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


# NaN whose payload is only in the bits that half precision drops: cut off, or rounded up, it would be Inf or 0.
PAYLOADS = [0x7F800001, 0x7F80FFFF, 0x7F801000, 0x7FBFFFFF, 0x7FFFFFFF, -0x7FFFFF, -0x1]


@pytest.mark.parametrize("chosen", [None, [0, 2, 5], [5, 2, 2, 0]], ids=["all", "some", "repeated"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_nan_stays_one_whatever_its_payload(dtype, transposed, chosen, monkeypatch, on_cpp):
    module = cpp.compiled()
    index = None if chosen is None else torch.tensor(chosen)
    width = 6 if chosen is None else len(chosen)
    for isa in module.ISAS[: module.best_isa() + 1]:
        monkeypatch.setenv("FASTEDIT_ISA", isa)
        master = torch.tensor(PAYLOADS, dtype=torch.int32).view(torch.float32)[:, None].repeat(1, 6)
        assert master.isnan().all()
        weight = torch.zeros_like(master, dtype=dtype)
        if transposed:
            weight, master = weight.T.contiguous().T, master.T.contiguous().T
        apply_delta(weight, torch.zeros(1, len(PAYLOADS)), torch.zeros(width, 1), index, master)
        columns = slice(None) if index is None else index
        assert weight[:, columns].isnan().all()


def test_an_instruction_set_that_is_not_there_is_named(monkeypatch, on_cpp):
    monkeypatch.setenv("FASTEDIT_ISA", "avx9")
    with pytest.raises(ValueError, match=r"FASTEDIT_ISA must be one of baseline.* here, got 'avx9'"):
        select_neurons(torch.ones(3), top_k=1)
    with pytest.raises(ValueError, match="lacks the instruction set"):
        cpp.compiled().select_neurons(9, 1, 0, 0, 0, 0, 0.5, True, 0)
    with pytest.raises(ValueError, match="threads must be positive"):
        cpp.compiled().select_neurons(0, 0, 0, 0, 0, 0, 0.5, True, 0)


def test_what_the_kernels_cannot_take_is_refused_with_the_reason(on_cpp):
    refusal = r"capture_keys: .* takes .*float16, got torch.float64; able"
    with pytest.raises(_dispatch.BackendUnavailable, match=refusal):
        capture_keys(torch.ones(1, 1, 2).double(), None, torch.ones(1), "silu")
    with pytest.raises(_dispatch.BackendUnavailable, match="run on the CPU, got a tensor on meta"):
        capture_keys(torch.ones(1, 1, 2, device="meta"), None, torch.ones(1, device="meta"), "silu")


def test_the_module_shares_the_threads_of_torch(on_cpp):
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


def test_without_the_module_every_op_runs_in_plain_torch(monkeypatch):
    with _dispatch.backend("torch"):
        wanted = everything()
    monkeypatch.delenv("FASTEDIT_BACKEND", raising=False)
    monkeypatch.setattr(cpp, "missing", lambda: "it was not compiled")
    monkeypatch.setattr(cpp, "compiled", lambda: pytest.fail("a kernel was requested"))
    assert same(everything(), wanted)
    refusal = r"it was not compiled; able: .*torch"
    with _dispatch.backend("cpp"), pytest.raises(_dispatch.BackendUnavailable, match=refusal):
        select_neurons(torch.ones(3), top_k=1)


SANITIZED = """
import importlib.util, sys, torch, fastedit
spec = importlib.util.spec_from_file_location("fastedit._cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["fastedit._cpu"] = module
import pytest
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "-k", "cpp", *sys.argv[2:]]))
"""


def library(name):
    run = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return run.stdout.strip()


@pytest.mark.slow
def test_no_kernel_reads_or_writes_where_it_may_not(tmp_path, on_cpp):
    """The tests of the ops on a module compiled with the address and undefined-behaviour sanitizers."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("needs g++ and its sanitizers")
    for name in ("setup.py", "csrc"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "fastedit").mkdir()
    options = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
    environment = os.environ | {"CXX": "g++", "CXXFLAGS": options, "FASTEDIT_CUDA": "0"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=1200)
    (module,) = (tmp_path / "fastedit").glob("_cpu*")
    preload = " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so")))
    environment = os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", SANITIZED, str(module), "tests/ops"]
    for isa in cpp.compiled().ISAS[: cpp.compiled().best_isa() + 1]:
        run = subprocess.run(
            command, cwd=ROOT, env=environment | {"FASTEDIT_ISA": isa}, capture_output=True, text=True, timeout=1200
        )
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
        assert " passed" in run.stdout
