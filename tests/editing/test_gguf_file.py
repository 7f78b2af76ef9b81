"""GGUF in, GGUF out: the file a model came from, with the edited tensors in place of the old ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from fastedit.editing.gguf_file import base_model, write_gguf
from fastedit.editor import Editor
from fastedit.model.load import load_model
from fastedit.records.edit import EditSet
from fastedit.runtime.places import NotSaved

TINY = Path(__file__).resolve().parents[1] / "tiny"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, write_tiny_gguf: Callable[..., None]) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write_tiny_gguf(TINY / "model", path, {"general.base_model.0.repo_url": "https://huggingface.co/makers/tiny"})
    return path


@pytest.fixture
def edited(source: Path, tiny_editor: Any, tiny_moments: dict[int, torch.Tensor], tiny_facts: EditSet) -> Editor:
    editor = Editor(load_model(str(source)), "nse", tiny_editor().config, moments=tiny_moments, progress=False)
    editor.edit(tiny_facts[:4])
    return editor


def test_the_file_is_the_source_with_the_edited_tensors(edited: Editor, source: Path, tmp_path: Path) -> None:
    exported = edited.export(tmp_path / "out", "gguf")
    assert exported.dtype == "float32"
    assert exported.holds is None

    (path,) = (tmp_path / "out").iterdir()
    old, new = gguf.GGUFReader(source), gguf.GGUFReader(path)
    assert [field for field in new.fields if not field.startswith("GGUF.")] == [
        field for field in old.fields if not field.startswith("GGUF.")
    ]
    edited_names = {f"blk.{layer}.ffn_down.weight" for layer in edited.weights.layers}
    for before, after in zip(old.tensors, new.tensors, strict=True):
        assert before.name == after.name
        if before.name in edited_names:
            assert after.tensor_type == gguf.GGMLQuantizationType.F32
        else:
            assert before.tensor_type == after.tensor_type
            assert np.array_equal(before.data, after.data)

    again = load_model(str(path))
    for (name, kept), (_, loaded) in zip(
        edited.model.state_dict().items(), again.model.state_dict().items(), strict=True
    ):
        assert torch.equal(kept, loaded), name


def test_half_precision_says_how_many_edits_hold(edited: Editor, tmp_path: Path) -> None:
    exported = edited.export(tmp_path / "half", "gguf", dtype="float16")
    assert exported.holds is not None
    assert exported.holds.n_edits == 4

    (path,) = (tmp_path / "half").iterdir()
    again = load_model(str(path))
    for layer in edited.weights.layers:
        assert torch.equal(again.down_weight(layer), edited.weights.current(layer).half().float())


def test_a_model_from_elsewhere_is_refused_and_what_there_is_named(
    tiny_editor: Any, tiny_facts: EditSet, tmp_path: Path
) -> None:
    editor = tiny_editor()
    editor.edit(tiny_facts[:2])
    with pytest.raises(ValueError, match=r"GGUF file that the model came from.*checkpoint, delta, lora"):
        editor.export(tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_bfloat16_is_refused(edited: Editor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype of a gguf must be one of float32, float16, got 'bfloat16'"):
        edited.export(tmp_path / "out", "gguf", dtype="bfloat16")


def test_an_adapter_names_the_model_behind_the_file(
    edited: Editor, source: Path, write_tiny_gguf: Callable[..., None], tmp_path: Path
) -> None:
    exported = edited.export(tmp_path / "lora", "lora")
    config = (tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8")
    assert '"base_model_name_or_path": "makers/tiny"' in config
    assert "its base is makers/tiny, whose weights are not those of the quantised file" in str(exported)

    bare = tmp_path / "bare.gguf"
    write_tiny_gguf(TINY / "model", bare)
    assert base_model(bare) is None
    assert base_model(source) == "makers/tiny"


def test_another_shape_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"blk\.2\.ffn_down\.weight is \(64, 192\), and the edited weight \(64, 191\)"):
        write_gguf(source, tmp_path / "out.gguf", {2: torch.zeros(64, 191)})


def test_a_file_that_holds_something_else_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = gguf.GGUFWriter.write_tensor_data

    def flipped(self: Any, tensor: Any, **more: Any) -> None:
        changed = np.array(tensor)
        changed.reshape(-1).view(np.uint8)[0] ^= 1
        write(self, changed, **more)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", flipped)
    with pytest.raises(NotSaved, match="is not in the file as it was written"):
        write_gguf(source, tmp_path / "out.gguf", {2: torch.zeros(64, 192)})


def test_a_field_that_was_written_otherwise_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = gguf.GGUFWriter.add_key_value

    def other(self: Any, key: str, value: Any, *rest: Any, **more: Any) -> None:
        add(self, key, value + 1 if key == "llama.context_length" else value, *rest, **more)

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", other)
    with pytest.raises(NotSaved, match=r"llama\.context_length is not in the file as it is in the source"):
        write_gguf(source, tmp_path / "out.gguf", {2: torch.zeros(64, 192)})
