"""Every kernel compiles for every architecture without spilling registers, and the module imports without a driver."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v", "-c"]
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def compiled(nvcc: str, source: Path, architecture: str, folder: Path) -> tuple[Path, str]:
    """The object of a kernel file, with what ptxas says of its registers."""
    target = folder / f"{source.stem}_{architecture}.o"
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, *FLAGS, "-gencode", code, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target, done.stdout + done.stderr


def spilled(report: str) -> list[str]:
    """The lines of a report that speak of spilled registers."""
    return [found.group() for found in SPILLS.finditer(report) if found.groups() != ("0", "0")]


@pytest.fixture(scope="session")
def objects(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Every kernel file compiled for Hopper."""
    folder = tmp_path_factory.mktemp("objects")
    return {source.stem: compiled(nvcc, source, "90", folder) for source in SOURCES}


@pytest.mark.parametrize("name", [source.stem for source in SOURCES])
def test_a_kernel_compiles_without_spilling(objects, name):
    report = objects[name][1]
    assert spilled(report) == [], report
    assert name == "cuda" or report.count("Used ") >= 1, report


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "89"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_kernel_compiles_without_spilling_elsewhere(nvcc, source, architecture, tmp_path):
    report = compiled(nvcc, source, architecture, tmp_path)[1]
    assert spilled(report) == [], report


@pytest.mark.slow
def test_spilled_registers_are_found(nvcc, tmp_path):
    source = tmp_path / "greedy.cu"
    body = "float v[300]; for (int i = 0; i < 300; ++i) v[i] = x[i * 7];\n"
    body += "__syncthreads(); for (int i = 0; i < 300; ++i) x[i * 5] = v[i] * v[299 - i] - v[i];"
    source.write_text(
        f"#pragma nv_diag_suppress 177\n__global__ void k(float* x) {{ {body.replace('for', UNROLLED)} }}"
    )
    assert spilled(compiled(nvcc, source, "90", tmp_path)[1]) != []


UNROLLED = "\n#pragma unroll\nfor"


@pytest.fixture(scope="session")
def module(nvcc: str, objects: dict[str, tuple[Path, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension module, its bindings compiled without CUDA's headers."""
    target = tmp_path_factory.mktemp("module") / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    headers = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    bindings = target.with_name("bindings.o")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-c"]
    for command in (
        ["g++", *flags, *headers, str(ROOT / "csrc/bindings_cuda.cpp"), "-o", str(bindings)],
        [nvcc, "-shared", *(str(path) for path, _ in objects.values()), str(bindings), "-o", str(target)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return target


def test_the_module_imports_without_a_driver_and_says_what_is_missing(module):
    """In a process of its own that is shown no device, so that it holds on a machine with a GPU too."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import _cuda; print(_cuda.problem())"
    done = subprocess.run(
        [sys.executable, "-c", program, str(module.parent)],
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip()
    assert "driver" in said or "device" in said, said
