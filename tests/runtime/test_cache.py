"""The cache: what cannot be written is told, and nothing needs it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastedit.runtime.cache import cache_folder, store_in_cache


def test_a_file_is_stored_whole(tmp_path: Path) -> None:
    store_in_cache(tmp_path / "a" / "b.safetensors", {"x": torch.ones(2)}, {"about": "x"})
    assert torch.equal(load_file(tmp_path / "a" / "b.safetensors")["x"], torch.ones(2))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.safetensors"]


@pytest.mark.parametrize("fault", ["read-only", "full", "no home"])
def test_a_cache_that_cannot_be_written_is_a_warning(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system") if fault == "read-only" else OSError(28, "No space left on device")

    if fault == "no home":
        monkeypatch.delenv("FASTEDIT_CACHE")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setattr("fastedit.runtime.cache.save_file", refused)

    path = cache_folder() / "moments" / "x.safetensors"
    assert not os.path.isfile(path)
    store_in_cache(path, {"x": torch.ones(2)}, {})
    assert f"{path}: not written" in caplog.text
    assert "FASTEDIT_CACHE names another folder" in caplog.text
    with pytest.raises(OSError, match=r"x\.safetensors: not written"):
        store_in_cache(path, {"x": torch.ones(2)}, {}, required=True)
