"""What every benchmark shares: the machine line, peak memory, and rows appended to bench/results/."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import resource
import subprocess
from pathlib import Path

import torch

from fastedit.doctor import matmul_rate

RESULTS = Path(__file__).resolve().parent / "results"
FIELDS = (
    "date", "commit", "benchmark", "backend", "shape", "dtype", "metric", "median", "low", "high", "unit",
    "peak_mb", "gemm_gflops", "torch", "python", "machine", "threads",
)  # fmt: skip


def device_name() -> str:
    """The GPU, or the processor, as a file name."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
        found = re.search(r"model name\s*:\s*(.+)", text)
        name = found.group(1) if found else platform.processor() or platform.machine()
        if "avx512f" in text:
            name += " avx512"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine_line() -> str:
    """Processor, threads, versions, and the matrix rate as it is now: a busy machine shows."""
    return (
        f"{device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, python"
        f" {platform.python_version()}, float32 matmul {matmul_rate():.0f} GFLOP/s"
    )


def reset_peak() -> None:
    """Start a new peak of resident memory where the system lets us (Linux)."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mb() -> float:
    """Peak resident memory in MB since `reset_peak`, or since the start where that is not to be had."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))
        if found:
            return int(found.group(1)) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def commit() -> str:
    """Short hash of the checkout, with + when it has changes."""
    root = RESULTS.parent.parent
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def append_row(**columns: object) -> Path:
    """Append one row to the device's file and return its path. Columns not in FIELDS raise ValueError."""
    path = RESULTS / f"{device_name()}.csv"
    path.parent.mkdir(exist_ok=True)
    shared = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        if new:
            writer.writeheader()
        writer.writerow({**shared, **columns})
    return path
