"""Saved models: in the dtype they came in, compared with what is in memory, and nothing replaced without a word."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastedit.editing import checkpoint
from fastedit.editing.checkpoint import main_dtype, rounded_weights, write_checkpoint
from fastedit.editing.stream import EditorBusy
from fastedit.editor import Editor
from fastedit.evaluation.answers import answer
from fastedit.model.adapter import ModelAdapter
from fastedit.model.load import load_model
from fastedit.model.save import read_tokenizer
from fastedit.records.edit import EditSet
from fastedit.runtime.places import NotSaved, PlaceError
from fastedit.weights.editable import EditableWeights

TINY = Path(__file__).resolve().parents[1] / "tiny"


@pytest.fixture
def copied(tmp_path: Path, tiny_parts: tuple[Any, Any]) -> Callable[..., Path]:
    """Writes the tiny model as a checkpoint of another dtype; some tensors may have one of their own."""

    def make(dtype: str, own: dict[str, torch.dtype] | None = None) -> Path:
        model, tokenizer = tiny_parts
        folder = tmp_path / f"source-{dtype}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

        tensors = {
            name: tensor.to((own or {}).get(name, getattr(torch, dtype)))
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
        return folder

    return make


def editor_of(source: Path, tiny_editor: Any, tiny_moments: Any, dtype: str = "float32") -> Editor:
    adapter = load_model(str(source), dtype)
    return Editor(adapter, "nse", tiny_editor().config, moments=tiny_moments, progress=False)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


class TestDtype:
    def test_a_checkpoint_comes_back_in_its_own(
        self, copied: Any, tiny_editor: Any, tiny_moments: Any, tiny_facts: EditSet, tmp_path: Path
    ) -> None:
        """Of each tensor: one in float32 among others in bfloat16 stays so, and the unedited ones keep their bits."""
        norm = "model.norm.weight"
        source = copied("bfloat16", {norm: torch.float32})
        editor = editor_of(source, tiny_editor, tiny_moments)
        editor.edit(tiny_facts[:4])
        exported = editor.save_pretrained(tmp_path / "out")
        assert exported.dtype == "bfloat16"
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"

        before, after = stored(source), stored(tmp_path / "out")
        assert before.keys() == after.keys()
        assert after[norm].dtype == torch.float32
        edited = {editor.adapter.weight_name(layer) for layer in editor.weights.layers}
        for name, tensor in after.items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name]) == (name not in edited), name

        assert exported.holds is not None
        assert exported.holds.n_edits == 4
        assert "of 4 in the model" in str(exported)
        # transformers' own config is left as it was.
        assert editor.model.dtype == torch.float32
        assert editor.model.config.dtype in (torch.float32, "float32")

    @pytest.mark.parametrize("loaded", ["float32", "bfloat16"])
    def test_another_one_is_asked_for(
        self, loaded: str, copied: Any, tiny_editor: Any, tiny_moments: Any, tiny_facts: EditSet, tmp_path: Path
    ) -> None:
        """From half precision the float32 masters of the edited weights are rounded, not the weights in memory."""
        editor = editor_of(copied("float32"), tiny_editor, tiny_moments, loaded)
        editor.edit(tiny_facts[:4])
        for dtype in ("float16", "float32"):
            exported = editor.save_pretrained(tmp_path / dtype, dtype)
            assert exported.dtype == dtype
            found = stored(tmp_path / dtype)
            for layer in editor.weights.layers:
                wanted = editor.adapter.oriented(layer, editor.weights.stored(layer)).to(getattr(torch, dtype))
                assert torch.equal(found[editor.adapter.weight_name(layer)], wanted)

        wide = editor.save_pretrained(tmp_path / "source")
        assert wide.dtype == "float32"
        assert wide.holds is None

    def test_the_masters_are_what_is_saved_in_float32(
        self, copied: Any, tiny_editor: Any, tiny_moments: Any, tiny_facts: EditSet, tmp_path: Path
    ) -> None:
        editor = editor_of(copied("float32"), tiny_editor, tiny_moments, "bfloat16")
        editor.edit(tiny_facts[:4])
        editor.save_pretrained(tmp_path / "out", "float32")
        name = editor.adapter.weight_name(3)
        saved = stored(tmp_path / "out")[name]
        assert not torch.equal(saved, saved.bfloat16().float())

    def test_rounding_is_told(
        self, copied: Any, tiny_editor: Any, tiny_moments: Any, tiny_facts: EditSet, tmp_path: Path
    ) -> None:
        """What holds as saved is what holds in the model that is loaded from the files."""
        editor = editor_of(copied("float32"), tiny_editor, tiny_moments)
        editor.edit(tiny_facts[:6])
        before = editor.weights.fingerprint()
        exported = editor.save_pretrained(tmp_path / "out", "bfloat16")
        assert editor.weights.fingerprint() == before

        again = load_model(str(tmp_path / "out"))
        held = answer(again, [(edit.prompt, edit.target_new, edit.join) for edit in tiny_facts[:6]])
        assert exported.holds is not None
        assert exported.holds.as_saved == sum(scored.exact for scored in held)

    def test_a_weight_too_large_for_float16(self, copied: Any, tmp_path: Path) -> None:
        source = copied("float32")
        adapter = load_model(str(source))
        adapter.down_parameter(5).data[0, 0] = 1e5
        with pytest.raises(ValueError, match=r"layers\.5\.mlp\.down_proj\.weight has numbers up to 1e\+05"):
            rounded_weights(adapter, _no_weights(adapter), torch.float16)

    def test_most_numbers_decide(self) -> None:
        tensors = {
            "a": torch.zeros(2),
            "b": torch.zeros(5, dtype=torch.bfloat16),
            "c": torch.zeros(9, dtype=torch.int8),
        }
        assert main_dtype(tensors) == torch.bfloat16


def _no_weights(adapter: ModelAdapter) -> Any:
    return EditableWeights(adapter, ())


class TestPlaces:
    """A good model is never lost to a save."""

    @pytest.fixture
    def edited(self, copied: Any, tiny_editor: Any, tiny_moments: Any, tiny_facts: EditSet) -> Editor:
        editor = editor_of(copied("float32"), tiny_editor, tiny_moments)
        editor.edit(tiny_facts[:2])
        return editor

    @pytest.mark.parametrize("force", [False, True])
    def test_never_onto_the_source(self, force: bool, edited: Editor, tmp_path: Path) -> None:
        (source,) = tmp_path.glob("source-*")
        before = {file.name: file.read_bytes() for file in source.iterdir()}
        for place in (source, source / ".." / source.name):
            with pytest.raises(PlaceError, match="would be overwritten"):
                edited.save_pretrained(place, force=force)
        assert {file.name: file.read_bytes() for file in source.iterdir()} == before

    def test_not_into_a_folder_with_something_in_it(self, edited: Editor, tmp_path: Path) -> None:
        edited.save_pretrained(tmp_path / "out")
        (tmp_path / "out" / "model-00002-of-00002.safetensors").write_text("of an older model")
        with pytest.raises(PlaceError, match="is not empty"):
            edited.save_pretrained(tmp_path / "out")

        (tmp_path / "out" / "keys.txt").write_text("mine")
        (tmp_path / "out" / "other.gguf").write_text("mine")
        edited.save_pretrained(tmp_path / "out", force=True)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
        load_model(str(tmp_path / "out"))

        edited.export(tmp_path / "out", "delta", force=True)
        load_model(str(tmp_path / "out"))
        assert (tmp_path / "out" / "delta.safetensors").is_file()
        assert (tmp_path / "out" / "keys.txt").read_text() == (tmp_path / "out" / "other.gguf").read_text() == "mine"

    def test_a_model_without_an_edit_in_force_is_told(self, edited: Editor, tmp_path: Path) -> None:
        assert "unedited" not in str(edited.save_pretrained(tmp_path / "edited"))
        edited.undo()
        assert "no edit is in force: this is the unedited model" in str(edited.save_pretrained(tmp_path / "out"))

    def test_while_another_thread_edits(self, edited: Editor, tiny_facts: EditSet, tmp_path: Path) -> None:
        """What is in the model then is not what is in force."""
        told: list[BaseException | None] = []

        class Saves:
            def begin(self) -> None:
                thread = threading.Thread(target=self.save)
                thread.start()
                thread.join()

            def save(self) -> None:
                try:
                    edited.save_pretrained(tmp_path / "out")
                except EditorBusy as error:
                    told.append(error)

            def after_batch(self, report: Any, last: bool) -> None:
                self.begin()

        edited.edit(tiny_facts[2:4], watch=Saves())
        assert len(told) == 2
        assert not (tmp_path / "out").exists()

    def test_onto_a_file(self, edited: Editor, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(PlaceError, match="a file stands there"):
            edited.save_pretrained(tmp_path / "out", force=True)
        assert (tmp_path / "out").read_text() == "mine"


class TestReadBack:
    """Files that hold something else than the model are noticed, and nothing is kept."""

    @pytest.fixture
    def parts(self, tiny_model: ModelAdapter, tmp_path: Path) -> tuple[ModelAdapter, dict[str, torch.Tensor], Path]:
        (tmp_path / "out").mkdir()
        return tiny_model, rounded_weights(tiny_model, _no_weights(tiny_model)), tmp_path / "out"

    @pytest.mark.parametrize("fault", ["bit", "shape", "missing", "extra"])
    def test_tensors(self, fault: str, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        adapter, tensors, folder = parts
        write = checkpoint.write_model
        name = adapter.weight_name(2)

        def faulty(model: Any, folder: Path, tensors: Any, size: str) -> None:
            write(model, folder, tensors, size)
            held = load_file(folder / "model.safetensors")
            if fault == "bit":
                held[name].view(torch.int32)[3, 5] ^= 1
            elif fault == "shape":
                held[name] = held[name].T.contiguous()
            elif fault == "missing":
                del held[name]
            else:
                held["model.layers.9.extra"] = torch.zeros(2)
            save_file(held, folder / "model.safetensors", {"format": "pt"})

        monkeypatch.setattr(checkpoint, "write_model", faulty)
        with pytest.raises(NotSaved, match="nothing was kept"):
            write_checkpoint(adapter, tensors, folder, [])

    def test_a_renamed_tensor_is_known_by_its_bytes(self, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        adapter, tensors, folder = parts
        write = checkpoint.write_model

        def renames(model: Any, folder: Path, tensors: Any, size: str) -> None:
            write(model, folder, tensors, size)
            held = load_file(folder / "model.safetensors")
            renamed = {name.replace("model.layers", "language_model.layers"): held[name] for name in held}
            save_file(renamed, folder / "model.safetensors", {"format": "pt"})

        monkeypatch.setattr(checkpoint, "write_model", renames)
        write_checkpoint(adapter, tensors, folder, [])

    def test_tokens(self, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        adapter, tensors, folder = parts

        def other(place: str) -> Any:
            tokenizer = read_tokenizer(place)
            tokenizer.add_tokens(["Paris"])
            return tokenizer

        assert write_checkpoint(adapter, tensors, folder, []) is None
        monkeypatch.setattr(checkpoint, "read_tokenizer", other)
        told = write_checkpoint(adapter, tensors, folder, [])
        assert told is not None
        assert told.startswith("the tokenizer that was written reads 'The capital of France is Paris.' otherwise than")
        assert "not [" in told

        def unreadable(place: str) -> Any:
            raise KeyError("LlamaTokenizerr")

        monkeypatch.setattr(checkpoint, "read_tokenizer", unreadable)
        told = write_checkpoint(adapter, tensors, folder, [])
        assert told is not None
        assert "cannot be read again (KeyError: 'LlamaTokenizerr')" in told


def test_a_tokenizer_that_is_read_back_otherwise_is_told(
    tiny_editor: Any, tiny_facts: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(place: str) -> Any:
        raise KeyError("LlamaTokenizerr")

    editor = tiny_editor()
    editor.edit(tiny_facts[:1])
    monkeypatch.setattr(checkpoint, "read_tokenizer", unreadable)
    exported = editor.save_pretrained(tmp_path / "out")
    assert "copy the tokenizer's files from the model's source" in str(exported)
    assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_every_shard_is_read(self, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        adapter, tensors, folder = parts
        opened = []

        def noted(file: Path, **more: Any) -> Any:
            opened.append(file.name)
            return safe_open(file, **more)

        monkeypatch.setattr(checkpoint, "safe_open", noted)
        write_checkpoint(adapter, tensors, folder, [], "300KB")
        assert sorted(opened) == sorted(file.name for file in folder.glob("*.safetensors"))
        assert len(opened) > 2


def test_settings_of_generation_that_contradict_do_not_lose_the_model(tiny_model: ModelAdapter, tmp_path: Path) -> None:
    """A published checkpoint may have a temperature without sampling; transformers refuses to save that."""
    settings = tiny_model.model.generation_config
    settings.do_sample, settings.temperature = False, 0.6
    (tmp_path / "out").mkdir()
    write_checkpoint(tiny_model, rounded_weights(tiny_model, _no_weights(tiny_model)), tmp_path / "out", [])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6
    assert tiny_model.model.generation_config is settings


@pytest.mark.parametrize(
    ("form", "limit"), [("checkpoint", 200), ("checkpoint", 30_000), ("delta", 2000), ("lora", 200), ("lora", 2000)]
)
def test_a_disk_that_is_full_is_one_sentence(
    form: str, limit: int, file_limit: Callable[..., Any], tiny_editor: Any, tiny_facts: EditSet, tmp_path: Path
) -> None:
    """It hits config, tokenizer or weights."""
    editor = tiny_editor()
    editor.edit(tiny_facts[:2])
    with file_limit(limit), pytest.raises(NotSaved, match=r"out: not saved \(.*File too large"):
        editor.export(tmp_path / "out", form)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_killed_export_is_done_again(tiny_editor: Any, tiny_facts: EditSet, tmp_path: Path) -> None:
    script = f"""
        import os, signal
        from fastedit.editor import Editor
        from fastedit.methods.columns.config import FiNEConfig
        from fastedit.records.load import load_edits
        from fastedit.runtime import places

        editor = Editor.from_pretrained({str(TINY / "model")!r}, "fine", FiNEConfig(frozen_layers=1), progress=False)
        editor.edit(load_edits({str(TINY / "facts.jsonl")!r}, limit=1))
        places._sync_all = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
        editor.export({str(tmp_path / "out")!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()

    editor = tiny_editor()
    editor.edit(tiny_facts[:2])
    editor.export(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "cache"}
