"""The one file: everything comes back, and what is no such file is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastedit.methods.meg import BadStore, MeG, Store


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
    made.model.down_parameter(7).data[0, 0] += 1
    with pytest.raises(BadStore, match="other weights"):
        made.load(meg_folder / "meg.safetensors")
