"""What this installation has: versions, devices, where ops run, and what is wrong."""

from __future__ import annotations

import importlib.metadata
import pkgutil
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import fastedit.ops
from fastedit.model.load import ALIASES, broken_transformers, resolve
from fastedit.ops import _dispatch, cpp
from fastedit.runtime.cache import cache_folder

DISTRIBUTION = "fastedit-engine"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "triton", "pybind11")

# What ops say of a kernel that was not compiled.
POINTER = " (fastedit doctor says why)"


@dataclass(frozen=True)
class Examination:
    """versions: package -> version or None; facts: what -> text; problems: what must be mended;
    ops: op -> backend, in the order in which they are tried -> why it cannot run here, None if it can."""

    versions: dict[str, str | None]
    facts: dict[str, str]
    ops: dict[str, dict[str, str | None]]
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{name:<20}{version or 'not installed'}" for name, version in self.versions.items()]
        lines += [f"{name:<20}{text}" for name, text in self.facts.items()]
        for op, backends in self.ops.items():
            able = ", ".join(name for name, reason in backends.items() if reason is None)
            unable = "; ".join(f"{name}: {reason}" for name, reason in backends.items() if reason is not None)
            lines.append(f"op {op:<17}{able}{unable and f'  ({unable})'}")
        lines += [f"PROBLEM: {problem}" for problem in self.problems] or ["no problems found"]
        return "\n".join(lines)


def examine() -> Examination:
    """Look at the installation; takes some seconds."""
    record = build_record()

    return Examination(
        {name: _version(name) for name in PACKAGES},
        {
            "python": platform.python_version(),
            "devices": ", ".join(_devices()),
            "threads": str(torch.get_num_threads()),
            "float32 matmul": f"{matmul_rate():.0f} GFLOP/s (1024^3)",
            **{f"{name} kernels": text for name, text in record.items()},
            "cache": str(cache_folder()),
            **{f"model {alias}": where_is(alias) for alias in ALIASES},
        },
        {
            module.name: {backend: _why_absent(module.name, backend, record) for backend in _dispatch.BACKENDS}
            for module in pkgutil.iter_modules(fastedit.ops.__path__)
            if module.name[0] != "_" and not module.ispkg
        },
        [
            *owners_problem(importlib.metadata.packages_distributions().get("fastedit", [])),
            *command_problem(importlib.metadata.entry_points(group="console_scripts", name="fastedit")),
            *range_problems(DISTRIBUTION),
            *range_problems("transformers"),
            *transformers_problem(),
        ],
    )


def where_is(alias: str) -> str:
    """Where an alias's model lies, or the command that gets it."""
    place = resolve(alias)
    if Path(place).exists():
        return place

    return f"not here; get it with `{ALIASES[alias].install}` (else it is taken from the hub, {place})"


def _why_absent(op: str, backend: str, record: dict[str, str]) -> str | None:
    """Why a backend of an op cannot run here; of kernels that were not compiled, what the build said."""
    reason = _dispatch.absent(op, backend)
    if reason is None or not reason.endswith(POINTER):
        return reason

    return f"{reason.removesuffix(POINTER)}: {record.get('cpu' if backend == 'cpp' else backend, 'not built')}"


def range_problems(distribution: str) -> list[str]:
    """Releases of Python and of other packages with which an installed distribution does not work, by its metadata."""
    try:
        about = importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        return [f"{distribution} is not installed, so the releases that it needs are not known; install it with pip"]

    problems = []
    python, wanted = platform.python_version(), about["Requires-Python"]
    if wanted and not SpecifierSet(wanted).contains(python, prereleases=True):
        problems.append(f"Python is {python}, {distribution} needs {wanted}: make an environment with another Python")

    for line in importlib.metadata.requires(distribution) or ():
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            problems += _release_problem(distribution, needed)

    return problems


def _release_problem(distribution: str, needed: Requirement) -> list[str]:
    """A problem where what a distribution needs is missing or of another release."""
    installed = _version(needed.name)
    if installed is not None and needed.specifier.contains(installed, prereleases=True):
        return []

    found = "not installed" if installed is None else installed
    return [
        f"{needed.name} is {found}, {distribution} needs {needed.specifier or 'it'}: run pip install"
        f" '{needed.name}{needed.specifier}'"
    ]


def transformers_problem() -> list[str]:
    """A problem where transformers cannot make a model, as with a package beside it that is too new."""
    reason = broken_transformers()
    return [] if reason is None else [f"transformers {_version('transformers')} cannot make a model: {reason}"]


def build_record() -> dict[str, str]:
    """What the installation compiled, "cpu" and "cuda" -> "compiled" or why not; the instruction set it uses here."""
    path = Path(fastedit.__file__).with_name("_build.txt")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ["cpu: not built", "cuda: not built"]
    record = dict(line.split(": ", 1) for line in lines)
    if cpp.missing() is None:
        module = cpp.compiled()
        record["cpu"] += f", {module.ISAS[cpp.setting()[0]]} of {', '.join(module.ISAS)}"
    return record


def command_problem(commands: Iterable[importlib.metadata.EntryPoint]) -> list[str]:
    """A problem when the installed command `fastedit` calls what this version no longer has.

    So it is in an installation from a checkout that was brought to a newer version since."""
    problems = []
    for command in commands:
        try:
            works = callable(command.load())
        except (ImportError, AttributeError):
            works = False
        if not works:
            problems.append(
                f"the command fastedit was installed for {command.value}, which is no command: install again"
            )

    return problems


def owners_problem(owners: list[str]) -> list[str]:
    """A problem when several distributions installed an import package `fastedit`: their files lie in one folder."""
    distinct = sorted(set(owners))
    if len(distinct) < 2:
        return []
    others = " ".join(name for name in distinct if name != "fastedit-engine")
    return [
        f"the import name fastedit belongs to {len(distinct)} distributions ({', '.join(distinct)}), their files are"
        f" mixed in one folder; run: pip uninstall {others}, then reinstall fastedit-engine"
    ]


def matmul_rate(size: int = 1024, repeats: int = 5) -> float:
    """Best float32 matrix product rate of `repeats`, in GFLOP/s."""
    left, right = torch.rand(size, size), torch.rand(size, size)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    devices = [f"cpu ({platform.machine()})"]
    if torch.cuda.is_available():
        devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return devices
