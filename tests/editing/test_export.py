"""Exports read by others: plain transformers, plain torch in a bare process, peft."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastedit.editing.checkpoint import rounded_weights, write_checkpoint
from fastedit.editing.export import Holds, delta
from fastedit.editing.load_delta import load_delta
from fastedit.editor import Editor
from fastedit.evaluation.metrics import compare
from fastedit.model.adapter import StoredModel
from fastedit.model.load import load_model, load_transformers
from fastedit.records.edit import EditSet

Make = Callable[..., Editor]


@pytest.fixture
def edited(tiny_editor: Make, tiny_facts: EditSet) -> Editor:
    editor = tiny_editor()
    editor.edit(tiny_facts[:6])
    return editor


def logits(model: Any, tokenizer: Any, facts: EditSet) -> torch.Tensor:
    with torch.no_grad():
        rows = [model(torch.tensor([tokenizer(fact.prompt)["input_ids"]])).logits[0, -1] for fact in facts[:8]]
    return torch.stack(rows).float()


def test_checkpoint_of_shards_gives_the_same_logits_and_metrics(
    edited: Editor, tiny_facts: EditSet, tmp_path: Path
) -> None:
    wanted = logits(edited.model, edited.tokenizer, tiny_facts)
    (tmp_path / "shards").mkdir()
    tensors = rounded_weights(edited.adapter, edited.weights)
    write_checkpoint(edited.adapter, tensors, tmp_path / "shards", [], max_shard_size="500KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model, tokenizer = load_transformers(str(tmp_path / "shards"), "float32")
    assert torch.equal(logits(model, tokenizer, tiny_facts), wanted)
    again = load_model(str(tmp_path / "shards"))
    found = compare(edited.adapter, again, tiny_facts[:6], fluency_prompts=0)
    assert found.edited == found.unedited


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_checkpoint_in_half_precision(dtype: str, edited: Editor, tmp_path: Path) -> None:
    before = edited.weights.fingerprint()
    edited.export(tmp_path / "half", dtype=dtype)
    assert edited.weights.fingerprint() == before
    model, _ = load_transformers(str(tmp_path / "half"), dtype)
    found, wanted = dict(model.named_parameters()), dict(edited.model.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, wanted[name].to(getattr(torch, dtype))), name


def test_delta_in_plain_torch(edited: Editor, tiny_parts: tuple[Any, Any], tiny_facts: EditSet, tmp_path: Path) -> None:
    found = edited.export(tmp_path / "delta", "delta")
    assert set(found.rank) == {2, 3, 4}
    assert max(found.rank.values()) <= 12
    assert max(found.error.values()) < 1e-5
    assert found.holds == Holds(6, 6, 6)
    model = copy.deepcopy(tiny_parts[0])
    name = edited.adapter.weight_name(3)
    names = [edited.adapter.weight_name(layer) for layer in (2, 3, 4)]
    torch.save({each: dict(model.named_parameters())[each].detach() for each in names}, tmp_path / "before.pt")
    script = f"""
        import sys
        sys.path[:0] = [{str(tmp_path / "delta")!r}]
        import torch
        from load_delta import load_delta

        class Holder(torch.nn.Module):
            def named_parameters(self, *rest, **more):
                return held.items()

        before = torch.load({str(tmp_path / "before.pt")!r}, weights_only=True)
        held = {{name: torch.nn.Parameter(weight) for name, weight in before.items()}}
        load_delta(Holder(), {str(tmp_path / "delta" / "delta.safetensors")!r})
        torch.save(held[{name!r}].detach(), {str(tmp_path / "after.pt")!r})
        assert not {{"transformers", "safetensors", "fastedit"}} & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = torch.load(tmp_path / "after.pt", weights_only=True)
    assert (after - edited.weights.current(3)).abs().max() < 1e-6
    load_delta(model, str(tmp_path / "delta" / "delta.safetensors"))
    wanted = logits(edited.model, edited.tokenizer, tiny_facts)
    error = (logits(model, edited.tokenizer, tiny_facts) - wanted).abs().max()
    assert error < 1e-4 * wanted.abs().max()


class TestDeltaIsChecked:
    """Nothing is written unless the whole file is what was exported and the model is the unedited one."""

    @pytest.fixture
    def path(self, edited: Editor, tmp_path: Path) -> Path:
        edited.export(tmp_path / "delta", "delta")
        return tmp_path / "delta" / "delta.safetensors"

    def refused(self, error: type[Exception], said: str, path: Path, model: Any) -> None:
        before = [parameter.data.clone() for parameter in model.parameters()]
        with pytest.raises(error, match=said):
            load_delta(model, str(path))
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))

    def test_every_changed_or_missing_byte(self, path: Path, tiny_parts: tuple[Any, Any]) -> None:
        good = path.read_bytes()
        size = int.from_bytes(good[:8], "little")
        places = [*range(0, 8 + size, 41), *range(8 + size, len(good), len(good) // 20)]
        for place in places:
            path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
            with pytest.raises((ValueError, KeyError, RuntimeError), match=r"delta\.safetensors"):
                load_delta(copy.deepcopy(tiny_parts[0]), str(path))
        for cut in (0, 7, 8 + size // 2, len(good) - 1):
            path.write_bytes(good[:cut])
            self.refused(ValueError, "damaged", path, copy.deepcopy(tiny_parts[0]))

    def test_twice_another_model_another_dtype(self, edited: Editor, path: Path, tiny_parts: tuple[Any, Any]) -> None:
        model = copy.deepcopy(tiny_parts[0])
        load_delta(model, str(path))
        self.refused(RuntimeError, "not the unedited weight.*added already", path, model)

        other = copy.deepcopy(tiny_parts[0])
        # The last of the layers: those before it must not be written either.
        dict(other.named_parameters())[edited.adapter.weight_name(4)].data[0, 0] += 1
        self.refused(RuntimeError, "layers.4.*not the unedited weight", path, other)
        load_delta(other, str(path), any_base=True)

        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            load_delta(copy.deepcopy(tiny_parts[0]).to(dtype), str(path))

    def test_names_and_shapes(self, edited: Editor, path: Path, tiny_parts: tuple[Any, Any]) -> None:
        self.refused(KeyError, "has no parameter", path, torch.nn.Linear(2, 2))
        model = copy.deepcopy(tiny_parts[0])
        weight = dict(model.named_parameters())[edited.adapter.weight_name(4)]
        weight.data = weight.data[:1].clone()
        self.refused(RuntimeError, "must be .* numbers, is", path, model)

    def test_a_file_of_an_earlier_version(self, edited: Editor, path: Path, tiny_parts: tuple[Any, Any]) -> None:
        save_file(load_file(path), path, {"format": "pt"})
        model = copy.deepcopy(tiny_parts[0])
        with pytest.warns(UserWarning, match="without checksums"):
            load_delta(model, str(path))
        assert (
            dict(model.named_parameters())[edited.adapter.weight_name(3)] - edited.weights.current(3)
        ).abs().max() < 1e-6
        name = f"{edited.adapter.weight_name(2)}/delta"
        save_file({name: torch.full((3, 3), float("nan"))}, path, {"format": "pt"})
        with pytest.warns(UserWarning, match="without checksums"):
            self.refused(ValueError, "not finite", path, copy.deepcopy(tiny_parts[0]))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_in_peft(
    family: str, edited: Editor, tiny_parts: tuple[Any, Any], tiny_facts: EditSet, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    editor = edited
    if family == "gpt2":
        # Stored (d_ff, d_model): a random model is enough, its deltas are put in by hand.
        import transformers

        config = transformers.GPT2Config(
            vocab_size=len(tiny_parts[1]),
            n_embd=32,
            n_layer=4,
            n_head=2,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=0,
        )
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
        shape = {"layers": (1, 2), "covariance_weight": 1.0}
        editor = Editor.from_model(model, tiny_parts[1], config=type(edited.config)(**shape), progress=False)
        for layer in (1, 2):
            change = torch.randn(32, 3) @ torch.randn(3, 128) / 30
            editor.weights.put(layer, None, editor.weights.original(layer) + change)
    base = copy.deepcopy(editor.model)
    for layer in editor.weights.layers:
        parameter = dict(base.named_parameters())[editor.adapter.weight_name(layer)]
        parameter.data = editor.adapter.oriented(layer, editor.weights.original(layer)).clone()
    tokenizer = editor.tokenizer
    wanted, unedited = (logits(model, tokenizer, tiny_facts) for model in (editor.model, base))
    editor.export(tmp_path / "lora", "lora")
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    error = (logits(loaded, tokenizer, tiny_facts) - wanted).abs().max()
    assert error < 1e-4 * wanted.abs().max()
    assert (unedited - wanted).abs().max() > 100 * error


def test_truncated_lora_measures_what_it_loses(edited: Editor, tmp_path: Path) -> None:
    before = edited.weights.fingerprint()
    exact, short = (edited.export(tmp_path / str(rank), "lora", rank) for rank in (None, 2))
    assert set(short.rank.values()) == {2}
    for layer, error in short.error.items():
        sizes = torch.linalg.svdvals(delta(edited.weights, layer))
        assert error == pytest.approx(float(sizes[2:].norm() / sizes.norm()), rel=1e-3)
        assert error > 100 * exact.error[layer]
    assert short.holds is not None
    assert short.holds.as_saved < short.holds.in_model
    assert edited.weights.fingerprint() == before
    assert json.loads((tmp_path / "2" / "adapter_config.json").read_text())["r"] == 2
    assert "edits that hold" in str(short)


def test_what_cannot_be_exported_is_named(edited: Editor, tiny_editor: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format must be one of"):
        edited.export(tmp_path / "a", "zip")
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
        edited.export(tmp_path / "a", "checkpoint", 3)
    for rank in (0, 1.5, True):
        with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
            edited.export(tmp_path / "a", "lora", rank)
    with pytest.raises(ValueError, match="dtype of a checkpoint must be one of float32, bfloat16, float16"):
        edited.export(tmp_path / "a", dtype="int4")
    with pytest.raises(ValueError, match="nothing to export"):
        tiny_editor().export(tmp_path / "a", "lora")
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        edited.export(tmp_path / "full", "delta")
    with pytest.raises(ValueError, match="dtype is of a checkpoint's weights, got 'float16' for lora"):
        edited.export(tmp_path / "b", "lora", dtype="float16")


def test_a_smaller_rank_than_asked_is_told(edited: Editor, tmp_path: Path) -> None:
    found = edited.export(tmp_path / "lora", "lora", rank=64)
    assert max(found.rank.values()) <= 12
    rank = max(found.rank.values())
    assert f"rank 64 was asked for: the edits have {rank} directions above rounding noise" in str(found)
    assert "was asked for" not in str(edited.export(tmp_path / "two", "lora", rank=2))


def test_an_adapter_names_its_base(edited: Editor, tmp_path: Path) -> None:
    """A hub id, or the folder; of a model from memory it says that nobody knows."""

    def base(name: str) -> str | None:
        config: dict[str, str] = json.loads((tmp_path / name / "adapter_config.json").read_text())
        return config["base_model_name_or_path"]

    edited.model.config._name_or_path = ""
    assert "the model came from memory" in str(edited.export(tmp_path / "memory", "lora"))
    assert base("memory") is None

    for source, place, wanted in [
        ("smollm2-135m", "/cache/model.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("maker/model", "maker/model", "maker/model"),
        (str(tmp_path), str(tmp_path), str(tmp_path)),
    ]:
        edited.adapter.source = source
        edited.adapter.stored = StoredModel(place, torch.float32, {})
        name = Path(source).name + "-lora"
        edited.export(tmp_path / name, "lora")
        assert base(name) == wanted
