"""From a name to a place: what an alias looks at, in which order, and what an error says."""

import shutil

import pytest
import torch

from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import UnsupportedModel
from fastedit.model.load import ALIASES, ModelNotFound, load_model, resolve
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
