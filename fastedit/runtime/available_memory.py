"""How much memory a process can still take before the system swaps, kills it, or torch raises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import psutil
import torch

# Bytes that can still be taken on a device; None where that cannot be told. `available_bytes` is one.
Available: TypeAlias = Callable[[torch.device], int | None]


def available_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device; None for a device that does not tell.

    On the CPU what the system can give without swapping, or what is left below the limit of the process's cgroup
    (a container's, a batch system's) if that is less. On a GPU what is free there and what torch holds in reserve."""
    if device.type == "cpu":
        left = psutil.virtual_memory().available
        limited = _left_in_cgroup()
        return left if limited is None else min(left, limited)

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

    return None


def gigabytes(n_bytes: float) -> str:
    """Bytes as a text of gigabytes, 10^9 each: 12.3 GB."""
    return f"{n_bytes / 1e9:.1f} GB"


def _left_in_cgroup(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes below the tightest memory limit of the process's control groups; None without a limit.

    root: where control groups are mounted; own: the file that names those of this process"""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None

    left = [room for line in lines for group in _groups(root, line) if (room := _room(group)) is not None]

    return min(left, default=None)


def _groups(root: Path, line: str) -> list[Path]:
    """Folders of the memory group of a line of /proc/self/cgroup, such as 4:memory:/a/b, and of those above it."""
    _, controllers, path = line.split(":", 2)
    if controllers == "":
        top = root
    elif "memory" in controllers.split(","):
        top = root / "memory"
    else:
        return []

    group = top / path.strip("/")

    # Inside a container the path may be that of the host, where only the top is mounted.
    return [folder for folder in (group, *group.parents) if folder == top or top in folder.parents]


def _room(group: Path) -> int | None:
    """Bytes below the limit of one group of either version; None if it has none. Memory of files that can be dropped
    does not count as used."""
    for limit_name, used_name, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = (group / limit_name).read_text(encoding="ascii").strip()
            used = int((group / used_name).read_text(encoding="ascii"))
            stat = (group / "memory.stat").read_text(encoding="ascii").split()
        except (OSError, ValueError):
            continue

        if limit == "max":
            return None
        droppable = dict(zip(stat[::2], map(int, stat[1::2]), strict=True)).get(inactive, 0)

        return max(0, int(limit) - used + droppable)

    return None
