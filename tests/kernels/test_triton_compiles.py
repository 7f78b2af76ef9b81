"""Every Triton kernel compiles to machine code as its launcher launches it, with no GPU and no interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = Path(__file__).parent / "compile_triton.py"


def compiled_kernels(capability, folder):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, str(COMPILE), str(capability)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_every_kernel_compiles_for_the_device(capability, tmp_path):
    kernels = compiled_kernels(capability, tmp_path)
    files = {path.stem for path in (COMPILE.parents[2] / "kernels/triton").glob("[a-z]*.py")}
    assert {kernel["launch"].split()[0] for kernel in kernels} == files
    for kernel in kernels:
        # All scores of a wide layer are held by 1024 threads of 64 registers. Else a few bytes are no spill in a loop.
        assert kernel["stack"] <= 16 or kernel["launch"].endswith("14336"), kernel
    by_launch = {kernel["launch"]: kernel for kernel in kernels}
    for op in ("masked_gram", "gram_update"):
        # float64 products go through the matrix units, float32 ones do not: there they would be TF32.
        assert by_launch[f"{op} torch.float64"]["matrix"] == ["DMMA"]
        assert by_launch[f"{op} torch.float32"]["matrix"] == []


def test_a_kernel_that_does_not_compile_is_found(tmp_path):
    code = f"""
import importlib.util, torch, triton
spec = importlib.util.spec_from_file_location("compile_triton", {str(COMPILE)!r})
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
from fastedit.kernels import gram_update
with tool.compiled(90):
    gram_update._update_kernel[(1,)](torch.zeros(4), torch.zeros(4), 1, 2, 2, 1, 2, 1, DTYPE=None, BLOCK=48, ROWS=16)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode != 0
    assert "power of 2" in run.stderr
