"""From a name to a place: what an alias looks at, in which order, and what an error says."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaModel

from fastedit.methods.meg.config import EncoderConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import UnsupportedModel
from fastedit.model.load import ALIASES, ModelNotFound, load_encoder, load_model, resolve
from fastedit.runtime.cache import cache_folder

ALIAS = "smollm2-135m"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the alias's name, first on the path, that holds the alias's file."""
    folder = tmp_path / "site" / ALIASES[ALIAS].package
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / ALIASES[ALIAS].file).touch()
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_an_alias_looks_in_the_cache_then_the_package_then_the_hub(cache, package):
    stored = cache / "models" / ALIAS
    stored.mkdir(parents=True)
    assert resolve(ALIAS) == str(stored)
    shutil.rmtree(stored)
    assert resolve(ALIAS) == str(package / ALIASES[ALIAS].file)
    (package / ALIASES[ALIAS].file).unlink()
    assert resolve(ALIAS) == ALIASES[ALIAS].hub_id


def test_the_cache_folder_is_read_when_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "one"))
    assert cache_folder() == tmp_path / "one"
    monkeypatch.delenv("FASTEDIT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fastedit"


@pytest.mark.parametrize("source", ["./nothing", "/no/such/folder", "~/nothing", "nothing.gguf"])
def test_a_path_that_does_not_exist_is_named(source, cache):
    with pytest.raises(ModelNotFound) as caught:
        resolve(source)
    assert source in str(caught.value)
    assert ALIAS in str(caught.value)


def test_other_names_stay_what_they_are(cache, tmp_path):
    assert resolve("someone/some-model") == "someone/some-model"
    assert resolve(str(tmp_path)) == str(tmp_path)


@pytest.fixture
def folder(random_llama, random_tokenizer, tmp_path):
    random_llama.float().save_pretrained(tmp_path / "model")
    random_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


TINY = Path(__file__).resolve().parents[1] / "tiny"


def test_a_bare_name_in_the_current_folder_is_loaded(write_tiny_gguf, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_gguf(TINY / "model", tmp_path / "tiny.gguf")
    shutil.copytree(TINY / "model", tmp_path / "tiny")
    whole = load_model(str(tmp_path / "tiny.gguf"))
    shutil.rmtree(cache)
    bare = load_model("tiny.gguf")
    assert bare.source == str(tmp_path / "tiny.gguf")
    assert torch.equal(bare.head.weight, whole.head.weight)
    assert load_model("tiny").source == str(tmp_path / "tiny")


def test_a_path_is_taken_like_its_text(folder):
    assert load_model(folder).source == str(folder)
    assert torch.equal(load_encoder(folder)[0].embed_tokens.weight, load_encoder(str(folder))[0].embed_tokens.weight)
    assert resolve(Path(ALIAS)) == resolve(ALIAS)
    assert EncoderConfig(source=folder).source == str(folder)


@pytest.mark.parametrize("source", [None, 3, b"tiny", ["tiny"]])
def test_what_is_no_name_is_told(source):
    for load in (load_model, load_encoder, resolve):
        with pytest.raises(TypeError, match="a model is named by a text or a path, got"):
            load(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "the name of the model is empty; give a folder, a .gguf file, a hub id, or smollm2-135m"),
        (" ", "the name of the model is empty; give a folder"),
        ("pipe", "pipe is neither a folder nor a file that can be read again and again; give"),
        ("pipe.gguf", "pipe.gguf is neither a folder nor a file that can be read again and again; give"),
        ("note.txt", "note.txt is a file whose name does not end in .gguf; give"),
        ("my model", "cannot load 'my model': that can be no hub id, which is NAME or OWNER/NAME of letters, "),
        ("a?b/c", "cannot load 'a?b/c': that can be no hub id, which is NAME or OWNER/NAME of letters, "),
        ("a" * 300, f"cannot load '{'a' * 300}': that can be no hub id, which is NAME or OWNER/NAME of letters, "),
    ],
    ids=["empty", "blank", "pipe", "pipe of a GGUF name", "file", "space", "sign", "length"],
)
def test_a_name_that_is_no_models_is_told_in_one_sentence(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pipe", "pipe.gguf"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "note.txt").write_text("not a model")
    with pytest.raises(ModelNotFound) as caught:
        load_model(source)
    assert str(caught.value).startswith(message)
    assert "Repo id" not in str(caught.value)


@pytest.mark.parametrize("source", ["", "pipe"])
def test_a_name_that_is_no_encoders_is_told(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelNotFound, match="give a folder, a hub id, or an installed package"):
        load_encoder(source)


@pytest.mark.parametrize("device", ["auto", {"": "cpu"}])
def test_a_gguf_file_is_not_spread(device, package):
    with pytest.raises(ValueError, match="which a GGUF file cannot be") as caught:
        load_model(ALIAS, device=device)
    assert str(caught.value).startswith(f"device {device!r}")
    assert ALIASES[ALIAS].install not in str(caught.value)


@pytest.mark.parametrize("device", ["tpu9", "cuda:x", "", None, "meta"])
def test_a_device_that_is_none_is_told_before_anything_is_read(device):
    with pytest.raises(ValueError, match="device must be cpu, cuda, cuda:1"):
        load_model("/no/such/model", device=device)


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ({"": "disk"}, "the whole model' on 'disk', which"),
        ({"model.embed_tokens": "cpu", "model.layers": "disk"}, "model.layers' on 'disk', which"),
        ({"": "meta"}, "the whole model' on 'meta', which"),
        ({"model.layers": 0, "lm_head": "cpu"}, "lm_head' on 'cpu' beside a GPU, which"),
    ],
    ids=str,
)
def test_a_map_that_offloads_a_part_is_refused_before_anything_is_read(device, told):
    with pytest.raises(ValueError, match=rf"device: the map puts '{told} offloads it.*load the whole model with"):
        load_model("/no/such/model", device=device)


@pytest.mark.parametrize(
    ("place", "told"),
    [("gpu", "device must be cpu"), (99, "device 'cuda:99' was asked for"), ("cuda:99", "device 'cuda:99' was asked")],
)
def test_a_place_of_a_map_that_is_none_is_told_before_anything_is_read(place, told):
    with pytest.raises(ValueError, match=told):
        load_model("/no/such/model", device={"": place})


def test_a_device_that_is_not_here_is_told(package):
    with pytest.raises(ValueError, match="device 'cuda:99' was asked for") as caught:
        load_model(ALIAS, device="cuda:99")
    assert ALIASES[ALIAS].install not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_is_loaded_as_it_was_saved(folder, random_llama, random_tokenizer, dtype):
    adapter = load_model(str(folder), dtype)
    assert isinstance(adapter, ModelAdapter)
    assert adapter.dtype == getattr(torch, dtype)
    assert torch.equal(adapter.down_weight(2), random_llama.model.layers[2].mlp.down_proj.weight.to(adapter.dtype))
    assert not any(parameter.requires_grad for parameter in adapter.model.parameters())
    assert not adapter.model.training
    text = "The twin of Tavisk is Pell."
    assert adapter.tokenizer(text)["input_ids"] == random_tokenizer(text)["input_ids"]


def test_an_alias_in_the_cache_is_loaded(folder, cache, random_llama):
    shutil.copytree(folder, cache / "models" / ALIAS)
    assert torch.equal(load_model(ALIAS).head.weight, random_llama.lm_head.weight)


def test_a_folder_without_weights_is_an_error_in_one_line(tmp_path, random_llama):
    random_llama.config.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match="cannot load") as caught:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_alias_says_how_to_install_it(cache, random_llama):
    random_llama.config.save_pretrained(cache / "models" / ALIAS)
    with pytest.raises(ModelNotFound, match="cannot load") as caught:
        load_model(ALIAS)
    assert ALIASES[ALIAS].install in str(caught.value)


def test_the_forward_is_checked_on_loading(folder, random_llama):
    random_llama.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    random_llama.save_pretrained(folder)
    with pytest.raises(
        UnsupportedModel, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 numbers that are not"
    ):
        load_model(str(folder))


def test_a_folder_that_holds_no_model_is_an_error_in_one_line(tmp_path):
    with pytest.raises(ModelNotFound, match="cannot load") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def rewrite_weights(folder, change):
    """Save the folder's weights anew after `change` of a dict of them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder, kind=ModelNotFound):
    """The message, of one line, with which a folder is refused."""
    with pytest.raises(kind) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert kind is UnsupportedModel or str(caught.value).startswith("cannot load")
    return str(caught.value)


DOWN = "model.layers.1.mlp.down_proj.weight"


def test_a_missing_weight_is_refused(folder, caplog):
    rewrite_weights(folder, lambda tensors: tensors.pop(DOWN))
    assert f"the checkpoint lacks {DOWN}," in refused(folder)
    assert not caplog.records


def test_a_missing_head_is_refused_unless_it_is_tied_to_the_embedding(folder):
    rewrite_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "the checkpoint lacks lm_head.weight," in refused(folder)
    rewrite_config(folder, tie_word_embeddings=True)
    adapter = load_model(str(folder))
    assert adapter.head.weight.data_ptr() == adapter.model.model.embed_tokens.weight.data_ptr()


def test_a_config_of_more_or_fewer_layers_is_refused(folder):
    rewrite_config(folder, num_hidden_layers=5)
    assert "the checkpoint lacks model.layers.4.input_layernorm.weight" in refused(folder)
    rewrite_config(folder, num_hidden_layers=3)
    assert "the checkpoint holds model.layers.3.input_layernorm.weight" in refused(folder)
    assert "and 6 more, which config.json does not know" in refused(folder)


def test_a_config_of_another_width_is_refused(folder):
    rewrite_config(folder, intermediate_size=40)
    assert "weights have other sizes than config.json says: model.layers.0.mlp.down_proj.weight" in refused(folder)


def test_a_weight_too_much_in_a_decoder_layer_is_refused(folder):
    rewrite_weights(folder, lambda tensors: tensors.update({"model.layers.2.self_attn.q_proj.bias": torch.ones(32)}))
    assert "the checkpoint holds model.layers.2.self_attn.q_proj.bias" in refused(folder)


def test_towers_draft_heads_and_computed_buffers_are_no_fault(folder):
    extra = {
        "vision_tower.layers.0.weight": torch.ones(2),
        "medusa_head.0.weight": torch.ones(2),
        "mtp.layers.0.weight": torch.ones(2),
        "model.layers.4.eh_proj.weight": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    rewrite_weights(folder, lambda tensors: tensors.update(extra))
    rewrite_config(folder, num_nextn_predict_layers=1)
    assert load_model(str(folder)).n_layers == 4


@pytest.mark.parametrize("name", ["qwen2-vl", "llava"])
def test_a_model_that_reads_images_too_is_loaded_for_its_texts(name, family_models, random_tokenizer, tmp_path):
    if name not in family_models:
        pytest.skip("edited from transformers 5 on")
    family_models[name].save_pretrained(tmp_path)
    random_tokenizer.save_pretrained(tmp_path)
    adapter = load_model(tmp_path)
    assert adapter.family.name == "llama with images"
    assert torch.equal(adapter.down_weight(1), ModelAdapter(family_models[name], random_tokenizer).down_weight(1))


def test_a_folder_without_a_tokenizer_says_what_to_copy(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    assert "holds no tokenizer: copy tokenizer.json" in refused(folder)


def test_an_adapter_folder_says_what_to_do(folder, tmp_path, random_llama):
    adapted = get_peft_model(random_llama, LoraConfig(target_modules=["down_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    assert "holds an adapter" in refused(tmp_path / "adapter")
    assert "merge" in refused(tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", folder)
    assert "holds an adapter" in refused(folder)


def test_adapter_layers_without_their_wrapper_are_refused(random_llama, random_tokenizer):
    adapted = get_peft_model(random_llama, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModel, match=r"has adapter layers in model\.layers\.0\.self_attn\.q_proj: give the"):
        ModelAdapter(random_llama, random_tokenizer)
    assert ModelAdapter(adapted.merge_and_unload(), random_tokenizer).n_layers == 4


def test_a_wrapped_model_says_what_to_give(random_llama, random_tokenizer):
    with pytest.raises(UnsupportedModel, match=r"DataParallel .*give what it wraps, model\.module"):
        ModelAdapter(torch.nn.DataParallel(random_llama), random_tokenizer)


def test_a_model_without_a_head_says_how_to_load_it(random_llama, random_tokenizer):
    with pytest.raises(UnsupportedModel, match="LlamaModel has no language-model head: load it with AutoModelForC"):
        ModelAdapter(LlamaModel(random_llama.config), random_tokenizer)
    for other in (torch.nn.Linear(2, 2), "gpt2"):
        with pytest.raises(UnsupportedModel, match="is no model of transformers"):
            ModelAdapter(other, random_tokenizer)


def test_a_mistyped_name_suggests_the_alias_or_the_neighbour(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound) as caught:
        load_model("smolm2-135m")
    assert "no folder 'smolm2-135m' is here, so it was taken for a hub id (did you mean smollm2-135m?)" in str(
        caught.value
    )
    (tmp_path / "edited").mkdir()
    with pytest.raises(ModelNotFound, match=r"did you mean .*/edited\?"):
        resolve(str(tmp_path / "edietd"))
    with pytest.raises(ModelNotFound, match="no model at runs/first/edited"):
        resolve("runs/first/edited")


def test_a_model_with_code_of_its_own_is_refused_and_nothing_is_asked(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("asked on the terminal"))
    rewrite_config(
        folder, model_type="theirs", auto_map={"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.M"}
    )
    (folder / "theirs.py").write_text("raise SystemExit('was run')")
    assert "needs Python code of its own (trust_remote_code), which is never run" in refused(folder, UnsupportedModel)


def test_an_error_of_any_type_is_one_line(folder, monkeypatch):
    for content in (b"", b"{}", b"not a checkpoint", bytes(range(256)) * 9):
        (folder / "model.safetensors").write_bytes(content)
        assert "cannot load" in refused(folder)
    (folder / "config.json").write_text("[1, 2]")
    assert "cannot load" in refused(folder)


def test_a_file_that_is_overwritten_does_not_change_the_model(folder):
    file = folder / "model.safetensors"
    adapter = load_model(str(folder))
    before = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.write(bytes(size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.model.state_dict().items())
    with file.open("r+b") as opened:
        opened.truncate(0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.model.state_dict().items())
