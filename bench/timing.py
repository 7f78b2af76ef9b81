"""Shared by every benchmark: the machine line, peak memory, and the rows appended to bench/results/."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
from pathlib import Path

import torch

from fastedit.cli.doctor import matmul_rate

RESULTS = Path(__file__).resolve().parent / "results"
# Columns are only ever added, at the end, so that the rows of older files stay valid.
FIELDS = (
    "date", "commit", "benchmark", "backend", "shape", "dtype", "metric", "median", "low", "high", "unit",
    "peak_mb", "gemm_gflops", "torch", "python", "machine", "threads",
    "gbytes_s", "gflops", "roof_share", "copy_gbytes_s", "chosen", "triton", "cuda", "driver",
)  # fmt: skip


def device_name(device: str | None = None) -> str:
    """The GPU, or with "cpu" or without a GPU the processor, as a file name."""
    if device != "cpu" and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
        model = re.search(r"model name\s*:\s*(.+)", text)
        name = model.group(1) if model else platform.processor() or platform.machine()
        if "avx512f" in text:
            name += " avx512"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine_line(device: str | None = None) -> str:
    """Device, threads, versions, and the processor's present matrix rate, which shows whether the machine is busy."""
    return (
        f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, python"
        f" {platform.python_version()}, float32 matmul {matmul_rate():.0f} GFLOP/s"
    )


def reset_peak() -> None:
    """Start a new peak of resident memory, where the system allows it (Linux)."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mb() -> float:
    """Peak resident memory in MB since `reset_peak`; since the start of the process where the peak cannot be reset."""
    peak = _status_mb("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if peak is None else peak


def resident_mb() -> float:
    """Resident memory in MB; the peak where the system does not report it."""
    now = _status_mb("VmRSS")
    return peak_mb() if now is None else now


def _status_mb(field: str) -> float | None:
    status = Path("/proc/self/status")
    text = status.read_text(encoding="ascii") if status.exists() else ""
    line = re.search(rf"{field}:\s+(\d+) kB", text)
    return int(line.group(1)) / 1024 if line else None


def commit() -> str:
    """Short hash of the checkout, with + when it has changes; without git the value of $COMMIT."""
    root = RESULTS.parent.parent
    if os.environ.get("COMMIT") or not (root / ".git").exists() or shutil.which("git") is None:
        return os.environ.get("COMMIT") or "unknown"
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Versions behind a row: torch, python, and those of a GPU's toolchain, empty where missing."""
    by_package = {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda or ""}
    try:
        by_package["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        by_package["triton"] = ""

    driver = Path("/proc/driver/nvidia/version")
    text = driver.read_text(encoding="ascii", errors="replace") if driver.exists() else ""
    number = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    by_package["driver"] = number.group(1) if number else ""
    return by_package


def append_row(device: str | None = None, **columns: object) -> Path:
    """Append one row to the device's file and return its path. Columns not in FIELDS raise ValueError."""
    path = RESULTS / f"{device_name(device)}.csv"
    path.parent.mkdir(exist_ok=True)
    unknown = sorted(set(columns) - set(FIELDS))
    if unknown:
        raise ValueError(f"no such columns: {', '.join(unknown)}; there are {', '.join(FIELDS)}")
    shared = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **versions(),
    }
    widen(path)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        if new:
            writer.writeheader()
        writer.writerow({**shared, **columns})
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of a file, whichever columns it was started with; missing columns are empty."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: row.get(name) or "" for name in FIELDS} for row in csv.DictReader(file)]


def widen(path: Path) -> None:
    """Add the missing columns to a file that was started with fewer. Raises ValueError for a column unknown here."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if header == list(FIELDS):
        return
    unknown = sorted(set(header) - set(FIELDS))
    if unknown:
        raise ValueError(f"{path}: columns {', '.join(unknown)} are not known here")
    rows = read_rows(path)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
