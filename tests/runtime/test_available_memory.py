"""How much memory is available: the system, control groups of both versions, and a device that does not tell."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from fastedit.runtime.available_memory import _left_in_cgroup, available_bytes, gigabytes

GB = 10**9


def group(folder: Path, version: int, limit: str, used: int, droppable: int = 0) -> None:
    """The files of one control group."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), 2: ("max", "current", "inactive_file")}
    most, present, inactive = names[version]
    (folder / f"memory.{most}").write_text(f"{limit}\n")
    (folder / f"memory.{present}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{inactive} {droppable}\nactive_file 7\n")


def named(tmp_path: Path, text: str) -> Path:
    """A file as /proc/self/cgroup."""
    path = tmp_path / "cgroup"
    path.write_text(text)
    return path


def test_a_cpu_gives_what_the_system_has_left() -> None:
    before = psutil.virtual_memory().available
    taken = torch.ones(1 << 26)
    found = available_bytes(torch.device("cpu"))
    assert found is not None
    assert 0 < found < psutil.virtual_memory().total
    # Others run beside the test.
    assert found < before + GB
    del taken


def test_a_device_that_does_not_tell_gives_none() -> None:
    assert available_bytes(torch.device("meta")) is None


def test_no_limit_and_no_groups_are_no_bound(tmp_path: Path) -> None:
    assert _left_in_cgroup(tmp_path, tmp_path / "none") is None
    assert _left_in_cgroup(tmp_path, named(tmp_path, "0::/a\n4:memory:/b\n3:cpu:/c\n")) is None
    group(tmp_path / "a", 2, "max", 3 * GB)
    assert _left_in_cgroup(tmp_path, named(tmp_path, "0::/a\n")) is None


@pytest.mark.parametrize(
    ("version", "line", "top"), [(2, "0::/a/b\n", "."), (1, "9:pids:/x\n4:cpu,memory:/a/b\n", "memory")]
)
def test_the_tightest_group_counts_less_what_can_be_dropped(tmp_path: Path, version: int, line: str, top: str) -> None:
    root = tmp_path / "mount"
    group(root / top / "a" / "b", version, str(10 * GB), 4 * GB, droppable=GB)
    assert _left_in_cgroup(root, named(tmp_path, line)) == 7 * GB

    # A limit of a group above bounds those in it.
    group(root / top / "a", version, str(6 * GB), 4 * GB)
    assert _left_in_cgroup(root, named(tmp_path, line)) == 2 * GB
    group(root / top, version, str(3 * GB), 4 * GB)
    assert _left_in_cgroup(root, named(tmp_path, line)) == 0


def test_inside_a_container_the_mounted_top_counts(tmp_path: Path) -> None:
    """The path is the host's, of which nothing is mounted but the container's own group."""
    group(tmp_path / "mount", 2, str(2 * GB), GB)
    assert _left_in_cgroup(tmp_path / "mount", named(tmp_path, "0::/docker/7f3a\n")) == GB


def test_the_limit_of_a_group_bounds_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastedit.runtime.available_memory._left_in_cgroup", lambda: 12345)
    assert available_bytes(torch.device("cpu")) == 12345


@pytest.mark.gpu
def test_a_gpu_gives_what_is_free_and_what_torch_holds() -> None:
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = available_bytes(device)
    held = torch.zeros(1 << 28, dtype=torch.uint8, device=device)
    during = available_bytes(device)
    assert before is not None
    assert during is not None
    assert before - during >= 1 << 28
    del held
    after = available_bytes(device)
    assert after is not None
    assert after - during >= 1 << 28


def test_bytes_are_told_in_gigabytes() -> None:
    assert gigabytes(12_345_678_901) == "12.3 GB"
