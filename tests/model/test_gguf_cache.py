"""GGUF files in the cache: the same model and tokenizer the second time, and never a damaged one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from fastedit.model import gguf_cache, load
from fastedit.model.adapter import ModelAdapter
from fastedit.model.gguf_cache import kept_folder
from fastedit.model.load import load_model
from fastedit.runs.identity import identity
from fastedit.weights.editable import EditableWeights

TINY = Path(__file__).resolve().parents[1] / "tiny"


@pytest.fixture
def file(write_tiny_gguf: Callable[..., None], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(TINY / "model", path)
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GGUF files that were read, in order."""
    places: list[str] = []
    unpacked = load._unpacked_gguf

    def noted(transformers: object, place: str) -> object:
        places.append(Path(place).name)
        return unpacked(transformers, place)

    monkeypatch.setattr(load, "_unpacked_gguf", noted)
    return places


def same(one: ModelAdapter, other: ModelAdapter) -> bool:
    """Whether two models have the same bits, tokenizer and settings, as a run compares them."""
    left, right = one.model.state_dict(), other.model.state_dict()
    return (
        left.keys() == right.keys()
        and all(torch.equal(left[name], right[name]) for name in left)
        and identity(one, EditableWeights(one, (1,))) == identity(other, EditableWeights(other, (1,)))
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_second_load_is_the_first(dtype: load.Dtype, file: Path, read: list[str]) -> None:
    first, second = load_model(str(file), dtype), load_model(str(file), dtype)
    assert read == ["tiny.gguf"]
    assert same(first, second)
    assert second.stored == first.stored
    assert not second.model.training

    # Another dtype is made of the same file in the cache.
    load_model(str(file), "float16")
    assert read == ["tiny.gguf"]


def test_what_is_kept_goes_by_content(
    file: Path, read: list[str], write_tiny_gguf: Callable[..., None], tmp_path: Path
) -> None:
    load_model(str(file))
    shutil.copy(file, tmp_path / "copy.gguf")
    load_model(str(tmp_path / "copy.gguf"))
    assert read == ["tiny.gguf"]

    write_tiny_gguf(TINY / "model", file, {"general.name": "another"})
    load_model(str(file))
    assert read == ["tiny.gguf", "tiny.gguf"]


def test_another_release_reads_the_file_itself(file: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    load_model(str(file))
    monkeypatch.setattr(gguf_cache, "version", lambda package: "99")
    load_model(str(file))
    assert len(read) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "about.json"])
@pytest.mark.parametrize("damage", ["bit", "gone"])
def test_a_damaged_one_is_told_and_read_again(
    name: str, damage: str, file: Path, read: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = load_model(str(file))
    path = kept_folder(file) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage == "bit":
        path.write_bytes(content)

    assert same(load_model(str(file)), first)
    assert len(read) == 2
    # Without this file nothing was kept.
    if (name, damage) != ("about.json", "gone"):
        assert "is not as it was written; the GGUF file is read again" in caplog.text
    assert same(load_model(str(file)), first)
    assert len(read) == 2


def test_a_cache_that_cannot_be_written_is_a_warning(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "blocked").touch()
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "blocked"))
    load_model(str(file))
    assert f"{file}: not kept in the cache" in caplog.text


def test_the_cache_is_bounded(file: Path, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model(str(file))
    size = sum(path.stat().st_size for path in kept_folder(file).iterdir())
    os.utime(kept_folder(file) / "about.json", (1, 1))

    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes() + bytes(32))
    monkeypatch.setattr(gguf_cache, "MOST_BYTES", int(2.5 * size))
    load_model(str(other))
    assert kept_folder(file).is_dir()
    assert kept_folder(other).is_dir()

    monkeypatch.setattr(gguf_cache, "MOST_BYTES", int(1.5 * size))
    third = tmp_path / "third.gguf"
    third.write_bytes(file.read_bytes() + bytes(64))
    load_model(str(third))
    assert [kept_folder(path).is_dir() for path in (file, other, third)] == [False, False, True]

    monkeypatch.setattr(gguf_cache, "MOST_BYTES", size // 2)
    shutil.rmtree(kept_folder(third))
    load_model(str(third))
    assert not kept_folder(third).is_dir()


def test_it_is_transformers_that_reads_what_is_kept(file: Path) -> None:
    first = load_model(str(file))
    model = transformers.AutoModelForCausalLM.from_pretrained(kept_folder(file))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), model.parameters(), strict=True))
