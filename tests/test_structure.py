"""Guards of the layout: import direction, names of ops, and what may not be imported where.

A guard is a function from a tree to the list of its violations. It must find none in this repository, and at
least one in every bad example below, so that a guard that has stopped looking fails too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent


def layers(contributing: str) -> tuple[tuple[str, ...], ...]:
    """The rows of CONTRIBUTING.md's block of layers, lowest first.

    "fastedit" is `fastedit/__init__.py`, the lazy public face."""
    (block,) = re.findall(r"```layers\n(.*?)```", contributing, flags=re.DOTALL)
    return tuple(tuple(line.split("  ")[0].split(", ")) for line in reversed(block.splitlines()))


LAYERS = layers((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
LEVEL = {package: level for level, row in enumerate(LAYERS) for package in row}

TOP_LEVEL = [
    *("csrc", "kernels", "fastedit", "tests", "bench", ".ci/run", "Makefile", "pyproject.toml", "setup.py"),
    *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"),
]
WEIGHT_WRITERS = {"weights", "editing", "editor"}
MODEL_LOADERS = {"fastedit.model.adapter", "fastedit.model.load"}
NO_OP_NEEDED = {
    "csrc": {
        *("README.md", "cpu.h", "simd.h", "gemm.h", "bindings_cpu.cpp"),
        *("cuda.h", "cuda.cuh", "cuda.cu", "bindings_cuda.cpp"),
    },
    "kernels/triton": {"__init__.py", "_launch.py"},
    "fastedit/ops/cpp": {"__init__.py"},
    "fastedit/ops/cuda": {"__init__.py"},
    "bench": {
        "run.py",
        "timing.py",
        "measure.py",
        "memory.py",
        "plot.py",
        "pytest_ops.py",
        "random_model.py",
        "editing.py",
        "published.py",
        "published_siblings.py",
        "published_fine.py",
        "fine.py",
        "columns.py",
        "fine_locality.py",
        "models.py",
        "kne_memory.py",
        "column_rows.py",
        "precision.py",
        "stream.py",
        "journal.py",
        "meg.py",
        "device.sh",
        "results",
    },
}
SOURCE = {".py", ".cpp", ".cu", ".cuh", ".h"}
TORCH_IN_C = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|caffe2)\b|\b(torch|at|c10)::")


class Import(NamedTuple):
    """One imported module, as a dotted absolute name."""

    target: str
    line: int
    typing_only: bool


def sources(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SOURCE and "__pycache__" not in path.parts:
                yield path


def python(root: Path, *folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sources(root, *folders):
        if path.suffix == ".py":
            yield path, ast.parse(path.read_text(encoding="utf-8"), str(path))


def dotted(root: Path, path: Path) -> str:
    """The module's name as installed: `kernels/triton/x.py` is `fastedit.kernels.x`."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[:2] == ["kernels", "triton"]:
        parts[:2] = ["fastedit", "kernels"]
    return ".".join(parts)


def layer_name(module: str) -> str:
    """`fastedit.ops._check` -> `ops`; `fastedit` and names of the public face -> `fastedit`."""
    parts = module.removesuffix(".__init__").split(".")
    return parts[1] if len(parts) > 1 else "fastedit"


def imports(tree: ast.Module, module: str) -> Iterator[Import]:
    """All imports of a module: at the top, in functions, relative, and `import_module("literal")`."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        for target in import_targets(node, module):
            yield Import(target, getattr(node, "lineno", 0), id(node) in typing_only)


def import_targets(node: ast.AST, module: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        package = module.split(".")[: -node.level] if node.level else []
        base = ".".join([*package, *filter(None, [node.module])])
        if base != "fastedit":
            return [base]
        return [f"fastedit.{alias.name}" if alias.name in LEVEL else "fastedit" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
        name = node.args[0]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            return ["fastedit" + name.value if name.value.startswith(".") else name.value]
    return []


def op_names(root: Path) -> set[str]:
    return {path.stem for path in (root / "fastedit/ops").glob("*.py") if not path.name.startswith("_")}


def import_direction(root: Path) -> list[str]:
    """Packages import from lower rows only. A Triton kernel may name the argument record of its op, for typing only."""
    problems = []
    for path, tree in python(root, "fastedit", "kernels"):
        module = dotted(root, path)
        own = layer_name(module)
        if own not in LEVEL:
            problems.append(f"{path.relative_to(root)}: no layer is given for {own!r}")
            continue
        for target, line, typing_only in imports(tree, module):
            other = layer_name(target)
            if target.split(".")[0] != "fastedit" or other == own:
                continue
            if typing_only and (own, other) == ("kernels", "ops"):
                continue
            if other not in LEVEL or LEVEL[other] >= LEVEL[own]:
                problems.append(f"{path.relative_to(root)}:{line}: {own} may not import {other}")
    return problems


def no_import_circles(root: Path) -> list[str]:
    """Modules of one package may import each other, but never in a circle. Imports for typing only do not count."""
    trees = {dotted(root, path).removesuffix(".__init__"): tree for path, tree in python(root, "fastedit")}
    needs = {
        module: {
            found for target, _, typing_only in imports(tree, module) if not typing_only and (found := target) in trees
        }
        for module, tree in trees.items()
    }
    problems: list[str] = []
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            problems.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for other in sorted(needs[module] - {module}):
                visit(other, (*way, module))
            done.add(module)

    for module in sorted(trees):
        visit(module, ())
    return problems


def ops_are_complete(root: Path) -> list[str]:
    problems = []
    for op in sorted(op_names(root)):
        tree = ast.parse((root / f"fastedit/ops/{op}.py").read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        problems += [f"fastedit/ops/{op}.py: no function {name}" for name in sorted({op, f"{op}_ref"} - functions)]
        if not (root / f"tests/ops/test_{op}.py").is_file():
            problems.append(f"tests/ops/test_{op}.py is missing")
    return problems


def stray_names(root: Path) -> list[str]:
    ops = op_names(root)
    problems = []
    for folder, others in NO_OP_NEEDED.items():
        entries = (root / folder).iterdir() if (root / folder).is_dir() else []
        names = {entry.name for entry in entries if entry.name != "__pycache__"} - others
        problems += [
            f"{folder}/{name} is not named after an op" for name in sorted(names) if Path(name).stem not in ops
        ]
    private = {path.stem.strip("_") for path in (root / "fastedit/ops").glob("_*.py")}
    for path in sorted((root / "tests/ops").glob("test_*.py")):
        if path.stem.removeprefix("test_").strip("_") not in ops | private:
            problems.append(f"{path.relative_to(root)} tests no module of fastedit/ops")
    return problems


def functions_are_short(root: Path) -> list[str]:
    """A body of at most 50 lines. Docstring and blank lines are free: air is no reason to split a function."""
    problems = []
    for path, tree in python(root, "fastedit", "kernels", "tests", "bench"):
        text = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            inside = text[body[0].lineno - 1 : body[-1].end_lineno] if body else []
            lines = sum(bool(line.strip()) for line in inside)
            if lines > 50:
                problems.append(f"{path.relative_to(root)}:{node.lineno}: {node.name} has {lines} lines, at most 50")
    return problems


def kernels_hides_nothing(root: Path) -> list[str]:
    """A package `kernels` at the top would hide Hugging Face's, which transformers looks for."""
    problems = ["kernels/__init__.py exists"] if (root / "kernels/__init__.py").exists() else []
    problems += [f"{path.relative_to(root)}: no tests under kernels/" for path in (root / "kernels").rglob("test_*")]
    for path, tree in [*python(root, "fastedit", "kernels", "tests", "bench")]:
        for target, line, _ in imports(tree, dotted(root, path)):
            if target.split(".")[0] == "kernels":
                problems.append(f"{path.relative_to(root)}:{line}: imports kernels, ours is fastedit.kernels")
    return problems


def transformers_only_where_models_come_in(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line}: only model.adapter and model.load import transformers at run time"
        for path, tree in python(root, "fastedit", "kernels")
        for target, line, typing_only in imports(tree, dotted(root, path))
        if target.split(".")[0] == "transformers" and not typing_only and dotted(root, path) not in MODEL_LOADERS
    ]


def weights_only_where_written(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line}: may import weights.editable for typing only"
        for path, tree in python(root, "fastedit")
        for target, line, typing_only in imports(tree, dotted(root, path))
        if target in ("fastedit.weights", "fastedit.weights.editable") and not typing_only
        if layer_name(dotted(root, path)) not in WEIGHT_WRITERS
    ]


def no_print(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{node.lineno}: print"
        for path, tree in python(root, "fastedit", "kernels")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]


def no_torch_in_compiled_code(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{number}: torch"
        for path in sources(root, "csrc")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if TORCH_IN_C.search(line)
    ]


def no_test_packages(root: Path) -> list[str]:
    return [f"{path.relative_to(root)} exists" for path in (root / "tests").rglob("__init__.py")]


def top_level_is_complete(root: Path) -> list[str]:
    return [f"{name} is missing" for name in TOP_LEVEL if not (root / name).exists()]


# Each guard with trees, written as {path: text}, that it must refuse.
BAD_TREES: dict[Callable[[Path], list[str]], list[dict[str, str]]] = {
    import_direction: [
        {"fastedit/ops/a.py": "from fastedit.weights.editable import add"},
        {"fastedit/ops/a.py": "from ..weights import add"},
        {"fastedit/config.py": "from . import editor"},
        {"fastedit/config.py": "from fastedit import Editor"},
        {"fastedit/edits.py": "import fastedit.config"},
        {"fastedit/solver.py": "def f():\n    import fastedit.methods.closed_form.nse"},
        {"fastedit/solver.py": "import_module('fastedit.methods.closed_form.values')"},
        {"fastedit/recipes/nse.py": "from .unknown.thing import x", "fastedit/unknown.py": ""},
        {"kernels/triton/a.py": "from fastedit.ops.a import a_ref"},
    ],
    no_import_circles: [
        {
            "fastedit/model/a.py": "from fastedit.model.b import x",
            "fastedit/model/b.py": "from fastedit.model.a import y",
        },
        {"fastedit/model/a.py": "from .b import x", "fastedit/model/b.py": "def f():\n    from .a import y"},
    ],
    ops_are_complete: [
        {"fastedit/ops/a.py": "def a(): ...\ndef a_ref(): ..."},
        {"fastedit/ops/a.py": "def a(): ...", "tests/ops/test_a.py": ""},
        {"fastedit/ops/a.py": "def a_ref(): ...", "tests/ops/test_a.py": ""},
    ],
    stray_names: [
        {"csrc/b.cpp": "", "fastedit/ops/a.py": ""},
        {"kernels/triton/utils.py": ""},
        {"bench/old.py": ""},
        {"tests/ops/test_b.py": "", "fastedit/ops/_check.py": ""},
    ],
    functions_are_short: [{"bench/run.py": "def f():\n" + "    x = 1\n" * 51}],
    kernels_hides_nothing: [
        {"kernels/__init__.py": ""},
        {"kernels/triton/test_a.py": ""},
        {"tests/a.py": "import kernels.triton"},
        {"fastedit/ops/a.py": "from kernels.triton import a"},
    ],
    transformers_only_where_models_come_in: [
        {"fastedit/editor.py": "from transformers import AutoModelForCausalLM"},
        {"fastedit/methods/a.py": "import transformers.models.llama"},
    ],
    weights_only_where_written: [
        {"fastedit/recipes/a.py": "from fastedit.weights.editable import add"},
        {"fastedit/recipes/a.py": "from fastedit import weights"},
        {"fastedit/solver.py": "from .weights import add"},
    ],
    no_print: [{"fastedit/cli/main.py": "print('x')"}, {"kernels/triton/a.py": "def f():\n    print(1)"}],
    no_torch_in_compiled_code: [
        {"csrc/a.cpp": "#include <torch/extension.h>"},
        {"csrc/a.cu": '#include "ATen/ATen.h"'},
        {"csrc/checks.h": "void f(at::Tensor x);"},
    ],
    no_test_packages: [{"tests/__init__.py": ""}, {"tests/ops/__init__.py": ""}],
    top_level_is_complete: [{"README.md": ""}],
}
GUARDS = list(BAD_TREES)

FOR_TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
GOOD_TREE = {
    "fastedit/__init__.py": FOR_TYPING + "from .editor import Editor",
    "fastedit/model/adapter.py": "import transformers\nfrom ..config import x\nfrom fastedit.ops.a import a",
    "fastedit/model/families.py": FOR_TYPING + "from .adapter import ModelAdapter",
    "fastedit/cli/main.py": "from fastedit import Editor",
    "fastedit/editing/stream.py": "from fastedit import weights",
    "fastedit/methods/a.py": FOR_TYPING + "from fastedit.weights.editable import EditableWeights",
    "fastedit/config.py": "import json",
    "fastedit/ops/a.py": "from ._check import x\nimport fastedit.kernels.a\ndef a(): ...\ndef a_ref(): ...",
    "fastedit/ops/_check.py": "",
    "tests/ops/test_a.py": "",
    "tests/ops/test_check.py": "",
    "kernels/triton/a.py": FOR_TYPING
    + "from fastedit.ops.a import A\nimport triton\nfrom fastedit.kernels import __doc__",
    "csrc/a.cpp": "// at: torch\n#include <cmath>",
    "csrc/bindings_cpu.cpp": "",
    "bench/a.py": 'def f():\n    """' + "words\n" * 60 + '"""\n    print(1)',
    "setup.py": "x = 1\n" * 80,
}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.__name__)
def test_repository_keeps_the_rule(guard: Callable[[Path], list[str]]) -> None:
    assert guard(ROOT) == []


@pytest.mark.parametrize("guard", GUARDS[:-1], ids=lambda guard: guard.__name__)
def test_guard_accepts_a_good_tree(guard: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert guard(write_tree(tmp_path, GOOD_TREE)) == []


@pytest.mark.parametrize(
    ("guard", "files"),
    [
        pytest.param(guard, files, id=f"{guard.__name__}-{number}")
        for guard, trees in BAD_TREES.items()
        for number, files in enumerate(trees)
    ],
)
def test_guard_refuses_a_bad_tree(guard: Callable[[Path], list[str]], files: dict[str, str], tmp_path: Path) -> None:
    assert guard(write_tree(tmp_path, files)) != []
