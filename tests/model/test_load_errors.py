"""What is said of a model that cannot be loaded: one line, with the file that is missing or damaged."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from fastedit.model.load import ModelNotFound, load_model
from fastedit.model.load_errors import NotLoadable, reason

TINY = Path(__file__).resolve().parent.parent / "tiny"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(TINY / "model", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(folder):
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(TINY / "model").save_pretrained(folder, max_shard_size="200KB")
    return folder


def refusal(place):
    """The line with which a model is refused, behind the words that name it."""
    with pytest.raises(ModelNotFound) as caught:
        load_model(str(place))
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(f"cannot load {str(place)!r}: ")
    return said.removeprefix(f"cannot load {str(place)!r}: ")


def test_a_cut_or_foreign_file_of_weights_is_named(folder, sharded):
    second = sorted(folder.glob("model-*.safetensors"))[1]
    second.write_bytes(second.read_bytes()[:-100])
    assert refusal(folder).startswith(f"{second.name} is cut or no safetensors file (Error while deser")
    second.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n")
    assert refusal(folder).startswith(f"{second.name} is cut or no safetensors file (Error while deser")
    second.unlink()
    assert refusal(folder) == f"{second.name}, which its index names, is not there: get the missing files"
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()
    assert refusal(folder).startswith(f"{second.name} and 1 more, which its index names")


def test_a_damaged_pickle_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(3, 2)[:-1] + b"nonsense")
    assert refusal(folder) == "pytorch_model.bin is cut or no file of weights: get that file anew"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_no_json_is_named(folder, name):
    (folder / name).write_text('{"a": ')
    assert name in refusal(folder)
    assert name == "config.json" or refusal(folder).startswith(f"{name} is no JSON (Expecting value: line 1")


def test_a_folder_without_a_config_is_told(folder):
    (folder / "config.json").unlink()
    assert refusal(folder) == "it holds no config.json: give the folder in which a model was saved"


def test_a_bare_key_is_explained(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "sillu"}))
    assert refusal(folder).startswith("'sillu' is a name that transformers ")


@pytest.mark.parametrize("content", [b"", b"not a GGUF file", b"GGUF\x03\x00\x00\x00" + 2 * (b"\x05" + bytes(7))])
def test_a_damaged_gguf_file_is_told(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    assert refusal(tmp_path / "model.gguf").startswith("it is cut or no GGUF file (")


def test_what_a_message_only_announces_is_kept_and_long_lists_are_cut(tmp_path):
    assert reason(ValueError("Validation error for field 'hidden_size':\n    TypeError: wanted int\nmore"), "none") == (
        "Validation error for field 'hidden_size': TypeError: wanted int"
    )
    assert len(reason(ValueError("x" * 5000), "none")) < 310
    assert reason(ValueError(), "none") == "ValueError"
    assert reason(NotLoadable("our own words:\nas they are"), "none") == "our own words:\nas they are"
