"""Hands csrc/ to ninja, if there is a compiler; without one every op runs in plain torch.
fastedit._cpu    C++17 and OpenMP; csrc/<op>.cpp once per instruction set, one of which is chosen at run time
fastedit._cuda   nvcc; if there are a GPU and nvcc, or FASTEDIT_CUDA=1 (FASTEDIT_CUDA=0: never)
fastedit/_build.txt tells `fastedit doctor` what was built, or why not. CXX, CXXFLAGS and LDFLAGS are heeded.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"
NVCC = shutil.which("nvcc", path=f"{os.environ.get('PATH')}:{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
GPU = os.path.exists("/dev/nvidiactl")
CXX = os.environ.get("CXX") or ("g++" if shutil.which("g++") else "c++")
SHARED = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-fopenmp"
# Fused multiply-add is wanted, and roots without errno; nothing else of fast-math is: the results feed a linear solve.
FLAGS = f"{CXX} -std=c++17 -O3 -ffp-contract=fast -fno-math-errno -fPIC -fvisibility=hidden {SHARED} "
FLAGS += f"{os.environ.get('CXXFLAGS', '')} -I{sysconfig.get_path('include')}"
ISAS = {"baseline": "", "avx2": "-mavx2 -mfma -mf16c"}
ISAS["avx512"] = f"{ISAS['avx2']} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
if platform.machine() not in ("x86_64", "AMD64"):
    ISAS = {"baseline": ""}
CUDA = f"{NVCC} -std=c++17 -O3 -Xcompiler -fPIC -gencode arch=compute_90,code=compute_90"
CUDA += "".join(f" -gencode arch=compute_{arch},code=sm_{arch}" for arch in (80, 89, 90))


def obstacle(name: str) -> str | None:
    """Why extension `name` cannot be built here, None if it can."""
    wish = os.environ.get("FASTEDIT_CUDA")
    if name == "cuda" and wish != "1" and (wish or not GPU or not NVCC):
        return f"FASTEDIT_CUDA={wish}" if wish else f"no {'nvcc' if GPU else 'GPU'} found, FASTEDIT_CUDA=1 compiles it"
    for package in ("pybind11", "ninja"):
        if find_spec(package) is None:
            return f"the Python package {package} is not installed"
    probe = f"{FLAGS} {' '.join(ISAS.values())} -shared -x c++ -o {os.devnull} -"
    done = subprocess.run(probe, shell=True, input="#include <Python.h>\n", text=True, capture_output=True, check=False)
    return f"the C++ compiler {CXX} fails: {' '.join(done.stderr.split())[:200]}" if done.returncode else None


class Ninja(build_ext):
    """Compiles an extension by a build.ninja of its own; objects stay below build/, so that a second build is short."""

    def build_extension(self, ext: Extension) -> None:
        """Write the rules and run them."""
        import ninja
        import pybind11

        name, target = ext.name.rpartition("_")[2], Path(self.get_ext_fullpath(ext.name)).resolve()
        variants, suffix = ({"cuda": ""}, "cu") if name == "cuda" else (ISAS, "cpp")
        link = f"{CUDA} -cudart static" if name == "cuda" else f"{FLAGS} {os.environ.get('LDFLAGS', '')}"
        lines, built = [f"rule link\n  command = {link} -shared $in -o $out"], ["bindings.o"]
        for rule, compiler in (("cpp", f"{FLAGS} -I{pybind11.get_include()}"), ("cu", CUDA)):
            lines += [f"rule {rule}\n  command = {compiler} $isa -MD -MF $out.d -c $in -o $out\n  depfile = $out.d"]
        lines += [f"build bindings.o: cpp {CSRC}/bindings_{name}.cpp"]
        for source in sorted({*CSRC.glob(f"*.{suffix}")} - {*CSRC.glob("bindings_*")}):
            for isa, options in variants.items():
                built.append(f"{source.stem}_{isa}.o")
                lines += [f"build {built[-1]}: {suffix} {source}\n  isa = -DFASTEDIT_ISA={isa} {options}"]
        lines += [f"build {target}: link {' '.join(built)}\n"]
        folder = CSRC.parent / "build" / name
        for needed in (folder, target.parent):
            needed.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(lines), encoding="utf-8")
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder, "--quiet"], check=True)


OBSTACLES = {name: obstacle(name) for name in ("cpu", "cuda")}
REPORT = "".join(f"{name}: {why or 'compiled'}\n" for name, why in OBSTACLES.items())
(CSRC.parent / "fastedit" / "_build.txt").write_text(REPORT, encoding="utf-8")
MODULES = [Extension(f"fastedit._{name}", []) for name, why in OBSTACLES.items() if why is None]
setup(ext_modules=MODULES, cmdclass={"build_ext": Ninja})
