"""The store file: everything is read back, and other files are refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastedit.methods.meg import BadStore, MeG, Store
from fastedit.methods.meg.store import FORMAT, STAGE, KnownNeurons, read_tensors
from fastedit.records.edit import EditSet


def test_everything_comes_back(meg_folder: Path, tmp_path: Path) -> None:
    store = Store.load(meg_folder / "meg.safetensors")
    assert len(store) == 12
    assert store.generator
    assert store.gate
    assert store.encoder
    assert set(store.seconds) == {"encoder", "vectors", "neurons", "gate", "generator"}
    store.save(tmp_path / "deep" / "copy.safetensors")
    again = Store.load(tmp_path / "deep" / "copy.safetensors")
    for field in dataclasses.fields(Store):
        left, right = getattr(store, field.name), getattr(again, field.name)
        if isinstance(left, torch.Tensor):
            assert torch.equal(left, right)
        elif isinstance(left, dict) and field.name != "seconds":
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)
        else:
            assert left == right
    assert not list((tmp_path / "deep").glob("*.part"))


def test_records_come_back_whole(meg_folder: Path, few_edits: EditSet) -> None:
    assert Store.load(meg_folder / "meg.safetensors").records == tuple(few_edits)


def test_two_edits_of_one_prompt_and_answer_do_not_shift_the_others(tmp_path: Path) -> None:
    known = KnownNeurons(torch.zeros(3))
    known.add(["a", "a", "b"], torch.arange(9.0).view(3, 3), torch.tensor([True, True, False]), 1.5)
    known.write(tmp_path, "key")
    again = KnownNeurons.read(tmp_path, "key")
    for name in ("a", "b"):
        assert torch.equal(again.flat[again.rows([name])], known.flat[known.rows([name])])
        assert torch.equal(again.solved[again.rows([name])], known.solved[known.rows([name])])
    assert again.seconds == 1.5
    assert not KnownNeurons.read(tmp_path, "other key").place


def test_other_files_are_refused(meg_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        Store.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(BadStore, match="cannot be read as safetensors"):
        Store.load(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(BadStore, match="wanted format 'fastedit-meg', got None"):
        Store.load(tmp_path / "plain.safetensors")
    with pytest.raises(BadStore, match="got 'fastedit-meg-stage'"):
        Store.load(meg_folder / "neurons.safetensors")
    store = Store.load(meg_folder / "meg.safetensors")
    monkeypatch.setattr("fastedit.methods.meg.store.VERSION", 2)
    store.save(tmp_path / "newer.safetensors")
    monkeypatch.undo()
    with pytest.raises(BadStore, match="wanted version 1, got 2"):
        Store.load(tmp_path / "newer.safetensors")


def test_a_store_of_another_model_is_refused(make_meg: Callable[..., MeG], meg_folder: Path) -> None:
    made = make_meg()
    made.adapter.down_parameter(7).data[0, 0] += 1
    with pytest.raises(BadStore, match="other weights"):
        made.load(meg_folder / "meg.safetensors")


@pytest.mark.parametrize("name", ["meg", "encoder", "neurons", "gate", "generator-dit"])
def test_every_changed_byte_is_found(name: str, meg_folder: Path, tmp_path: Path) -> None:
    """In the numbers no place looks wrong by itself: only the checksum tells."""
    good = (meg_folder / f"{name}.safetensors").read_bytes()
    path = tmp_path / f"{name}.safetensors"
    size = 8 + int.from_bytes(good[:8], "little")
    for place in [*range(9, size, size // 30), *range(size, len(good), len(good) // 30)]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(BadStore, match=rf"{name}\.safetensors"):
            read_tensors(path, FORMAT if name == "meg" else STAGE)
    path.write_bytes(good)
    read_tensors(path, FORMAT if name == "meg" else STAGE)


def test_a_file_of_an_earlier_version_has_no_checksum(meg_folder: Path, tmp_path: Path) -> None:
    path = meg_folder / "meg.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    del header["sha256"]
    save_file(load_file(path), tmp_path / "older.safetensors", header)
    assert Store.load(tmp_path / "older.safetensors").facts == Store.load(path).facts
