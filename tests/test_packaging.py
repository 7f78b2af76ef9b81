"""What is installed: the wheel's content, `fastedit.kernels` beside Hugging Face's `kernels`, a quiet import.

Everything is asked of a fresh interpreter, because this one has imported half of the package already.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "fastedit", "kernels")
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false", "FASTEDIT_CUDA": "0"}


def python(code: str, *options: str, cwd: Path, path: Path | None = None) -> str:
    """Standard output of `python -c code` run in `cwd`, with `path` first on the module search path."""
    lines = [f"import sys; sys.path.insert(0, {str(path)!r})"] if path else []
    command = [sys.executable, *options, "-c", "\n".join([*lines, code])]
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def pip(verb: str, *arguments: str, **environment: str) -> None:
    """Run pip on local sources only: no index, no dependencies, no isolated build."""
    command = [sys.executable, "-m", "pip", verb, "-q", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-index", "--no-build-isolation", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)
    assert run.returncode == 0, run.stderr


def is_installed(distribution: str) -> bool:
    return any(found.name == distribution for found in importlib.metadata.distributions())


def declared_packages() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^packages = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return re.findall(r'"([\w.]+)"', block[1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that a build leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.txt")
            )
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built where there is no compiler."""
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "-w", str(out), str(source), **NO_COMPILER)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_every_package_is_listed() -> None:
    on_disk = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fastedit").rglob("__init__.py")}
    assert sorted(declared_packages()) == sorted(on_disk | {"fastedit.kernels"})


def test_wheel_has_one_top_level_name(unpacked: Path) -> None:
    names = {entry.name for entry in unpacked.iterdir() if not entry.name.endswith(".dist-info")}
    assert names == {"fastedit"}


def test_wheel_has_every_file_of_the_package(unpacked: Path) -> None:
    wanted = {"fastedit/py.typed", "fastedit/_build.txt", "fastedit/data/demo.jsonl"}
    for path in (ROOT / "fastedit").rglob("*"):
        if path.suffix in {".py", ".yaml", ".jsonl"}:
            wanted.add(path.relative_to(ROOT).as_posix())
    for path in (ROOT / "kernels/triton").glob("*.py"):
        wanted.add(f"fastedit/kernels/{path.name}")
    packed = {path.relative_to(unpacked).as_posix() for path in (unpacked / "fastedit").rglob("*") if path.is_file()}
    assert packed == wanted
    assert any(name.startswith("fastedit/methods/closed_form/presets/") for name in packed)


def test_wheel_says_what_it_is(wheel: Path, unpacked: Path, tmp_path: Path) -> None:
    (folder,) = unpacked.glob("*.dist-info")
    about = importlib.metadata.PathDistribution(folder)
    assert about.metadata["Name"] == "fastedit-engine"
    assert about.version == python("import fastedit; print(fastedit.__version__)", cwd=tmp_path, path=unpacked)
    assert about.metadata["License-Expression"] == "Apache-2.0"
    assert wheel.name.endswith("-py3-none-any.whl")
    assert [(entry.name, entry.value) for entry in about.entry_points] == [("fastedit", "fastedit.cli.main:main")]


def test_without_a_compiler_the_build_says_so(unpacked: Path) -> None:
    cpu, cuda = (unpacked / "fastedit/_build.txt").read_text(encoding="utf-8").splitlines()
    assert cpu.startswith("cpu: the C++ compiler /bin/false fails")
    assert cuda == "cuda: FASTEDIT_CUDA=0"


@pytest.mark.skipif(importlib.util.find_spec("fastedit._cpu") is None, reason="there is no compiler here")
def test_a_wheel_with_compiled_kernels_is_of_its_platform_and_has_them(source: Path, tmp_path: Path) -> None:
    # Not optimised: what is asked of it is only where it lies and that it can be imported.
    environment = NO_COMPILER | {"CXX": os.environ.get("CXX", ""), "CXXFLAGS": "-O0"}
    pip("wheel", "-w", str(tmp_path), str(source), **environment)
    (path,) = tmp_path.glob("*.whl")
    assert not path.name.endswith("-none-any.whl")
    assert f"cp3{sys.version_info.minor}" in path.name
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "site")
    names = {entry.name for entry in (tmp_path / "site").iterdir() if not entry.name.endswith(".dist-info")}
    assert names == {"fastedit"}
    (module,) = (tmp_path / "site/fastedit").glob("_cpu*")
    code = "import fastedit._cpu as c; print(c.__file__, c.ISAS[c.best_isa()])"
    found, isa = python(code, "-S", cwd=tmp_path, path=tmp_path / "site").split()
    assert Path(found) == module
    assert isa in ("baseline", "avx2", "avx512")


def test_kernels_of_a_wheel(unpacked: Path, tmp_path: Path) -> None:
    found = python("import fastedit.kernels; print(fastedit.kernels.__file__)", cwd=tmp_path, path=unpacked)
    assert Path(found) == unpacked / "fastedit/kernels/__init__.py"


def test_kernels_of_an_editable_install(source: Path, tmp_path: Path) -> None:
    """The mapped package is found in the checkout, whatever folder Python is started in."""
    site = tmp_path / "site"
    pip("install", "--target", str(site), "-e", str(source), **NO_COMPILER)
    # -S leaves out the environment's own installation of fastedit, which would be found first.
    code = f"import site; site.addsitedir({str(site)!r})\nimport fastedit.kernels as k; print(k.__file__)"
    for folder in (tmp_path, source):
        assert Path(python(code, "-S", cwd=folder)) == source / "kernels/triton/__init__.py"


def test_import_is_light_and_quiet(unpacked: Path, tmp_path: Path) -> None:
    code = """
import json, os, sys, threading
before = dict(os.environ)
import fastedit, fastedit.kernels
heavy = {"torch", "transformers", "triton", "numpy", "pydantic", "rich", "yaml"} & set(sys.modules)
print(json.dumps([sorted(heavy), before == dict(os.environ), threading.active_count()]))
"""
    assert json.loads(python(code, cwd=tmp_path, path=unpacked)) == [[], True, 1]
    assert list(tmp_path.iterdir()) == []


COEXIST = """
import kernels, fastedit.kernels
from transformers import LlamaForCausalLM
assert hasattr(kernels, "get_kernel"), f"hidden by {kernels.__path__}"
assert fastedit.kernels.__doc__.startswith("Triton kernels")
print(LlamaForCausalLM.__name__)
"""


def test_hugging_face_kernels_is_not_hidden() -> None:
    if not is_installed("kernels"):
        pytest.skip("Hugging Face's kernels is not installed")
    assert python(COEXIST, cwd=ROOT) == "LlamaForCausalLM"


def test_hidden_kernels_would_be_noticed(source: Path, tmp_path: Path) -> None:
    """The check above is worth something: it fails where our folder is an importable package."""
    if not is_installed("kernels"):
        pytest.skip("Hugging Face's kernels is not installed")
    root = shutil.copytree(source, tmp_path / "root")
    (root / "kernels/__init__.py").touch()
    with pytest.raises(AssertionError, match="hidden by"):
        python(COEXIST, cwd=root)
