"""The CUDA kernels compiled for the CPU, by the toolkit's headers and the emulation beside this file.

The launchers of fastedit.ops.cuda are called directly, on CPU tensors: what is tested is their own code and that of the
kernels. Only the stream, which a CPU does not have, is replaced.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch

from fastedit.ops import cuda

ROOT = Path(__file__).resolve().parents[3]
# Beside the bindings, a door to index arithmetic whose large numbers no test can reach by a launch.
DOOR = """
extern "C" __attribute__((visibility("default"))) std::int64_t triangle_row(std::int64_t tile) {
  return fastedit::cuda::triangle_row(tile);
}
"""


def toolkit_headers(nvcc: str, source: Path) -> Path:
    """The folder of CUDA's headers, as nvcc itself names it: the nvcc on PATH may be a script that calls another."""
    told = subprocess.run([nvcc, "--dryrun", "-c", str(source)], capture_output=True, text=True, check=True).stderr
    found = re.search(r'INCLUDES="-I([^"]+)"', told)
    assert found is not None, told
    return Path(found.group(1))


@pytest.fixture(scope="session")
def nvcc() -> str:
    """CUDA's compiler."""
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc is not on PATH")
    return found


@pytest.fixture(scope="session")
def emulated_file(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension module of csrc/*.cu and csrc/bindings_cuda.cpp, made by the C++ compiler in one go."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    folder = tmp_path_factory.mktemp("emulated")
    sources = [*sorted((ROOT / "csrc").glob("*.cu")), ROOT / "csrc" / "bindings_cuda.cpp"]
    text = "".join(f'#include "{source}"\n' for source in sources) + DOOR
    (folder / "all.cpp").write_text(text, encoding="utf-8")
    toolkit = toolkit_headers(nvcc, sources[0])
    headers = [toolkit, toolkit / "cccl", pybind11.get_include(), sysconfig.get_path("include")]
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"]
    command += [
        "-I",
        str(ROOT / "tests/kernels/cuda/emulation"),
        *(part for path in headers for part in ("-isystem", str(path))),
    ]
    done = subprocess.run([*command, str(folder / "all.cpp"), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def emulated_module(emulated_file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastedit._cuda", emulated_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The launchers run on CPU tensors; what a kernel forgets to write is NaN, or the largest integer."""
    monkeypatch.setattr(cuda, "compiled", lambda: emulated_module)
    monkeypatch.setattr(cuda, "stream_of", lambda device: 0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["forward", "backward", "shuffled", "warps", "warps_backward"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The order in which the threads of a block run; a result that depends on it lacks a barrier."""
    monkeypatch.setenv("EMULATED_ORDER", request.param)
    return request.param
