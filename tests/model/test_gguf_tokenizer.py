"""The tokenizer of a GGUF file: the token ids of the tokenizer it was written from, under every release of
transformers."""

import dataclasses
import hashlib
import json

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastedit.model import gguf_tokenizer
from fastedit.model.gguf_tokenizer import CONTROL, USER_DEFINED, BadTokenizer, read_fields
from fastedit.model.load import ModelNotFound, load_model, load_transformers, resolve

TEXTS = (
    "The twin of Tavisk is Pell. The capital of Żubrówka is Łomża.",
    "  two spaces, 東京 in 1987\n\n1. don't\r\n\tx = 3",
    "a<end>b <unused> Rook",
    " ",
)

NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def write_gguf(path, tokenizer, kind, model=None, architecture="llama", **fields):
    """A GGUF file of a tokenizer, with the weights of a Llama if one is given; `fields` are the tokenizer's."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_tokenizer_model(kind)
    for name, value in fields.items():
        add = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](f"tokenizer.ggml.{name}", value)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_token_list(sorted(parts["vocab"], key=parts["vocab"].get))
    if kind == "gpt2":
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in parts["merges"]])
    if model is not None:
        add_model(writer, model.float())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_model(writer, model):
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        *_, part, _ = name.split(".")
        array = tensor.numpy()
        if part in ("q_proj", "k_proj"):
            # GGUF holds the two halves that rotate together row by row.
            heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        writer.add_tensor(f"{block}{NAMES[part]}.weight", np.ascontiguousarray(array))


# Of the default model, "The mother tongue of Danielle Darrieux is" and all texts below.
IDS = [504, 3379, 10663, 282, 10789, 290, 9117, 3153, 4808, 314]
DIGEST = "12a8ce873299b631"

BYTE_LEVEL = {"pre": "gpt-2", "token_type": [CONTROL] * 3 + [1] * 317, "eos_token_id": 2, "padding_token_id": 0}


@pytest.fixture
def byte_level(tmp_path, random_tokenizer, random_llama):
    """Writes GGUF files of the random model with its byte-level tokenizer."""

    def write(**fields):
        return write_gguf(tmp_path / "model.gguf", random_tokenizer, "gpt2", random_llama, **{**BYTE_LEVEL, **fields})

    return write


def test_a_file_is_loaded_with_its_own_weights_and_token_ids(byte_level, random_llama, random_tokenizer):
    adapter = load_model(str(byte_level()))
    assert torch.equal(adapter.down_weight(2), random_llama.model.layers[2].mlp.down_proj.weight)
    ids = torch.tensor([random_tokenizer(TEXTS[0])["input_ids"]])
    assert torch.allclose(adapter.model(ids).logits, random_llama.float()(ids).logits, atol=1e-5)
    assert [adapter.tokenizer(text)["input_ids"] for text in TEXTS] == [
        random_tokenizer(text)["input_ids"] for text in TEXTS
    ]
    assert (adapter.tokenizer.eos_token, adapter.tokenizer.pad_token) == ("<end>", "<pad>")


def test_nothing_is_printed_while_a_file_is_loaded(byte_level, capfd):
    load_model(str(byte_level()))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("flag", [True, False, None])
def test_a_beginning_of_text_token_is_there_if_the_file_says_so(byte_level, tmp_path, random_tokenizer, flag):
    fields = {"bos_token_id": 1} | ({} if flag is None else {"add_bos_token": flag})
    _, tokenizer = load_transformers(str(byte_level(**fields)), "float32")
    wanted = [[1] * (flag is True) + random_tokenizer(text)["input_ids"] for text in TEXTS]
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == wanted
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [again(text)["input_ids"] for text in TEXTS] == wanted
    assert again.decode(again(TEXTS[1])["input_ids"], skip_special_tokens=True) == TEXTS[1]


def test_tokens_that_the_maker_defined_stay_whole(byte_level):
    types = [*BYTE_LEVEL["token_type"]]
    types[300] = USER_DEFINED
    fields = read_fields(byte_level(token_type=types))
    word = fields.tokens[300]
    assert gguf_tokenizer.build(fields).encode(f"x{word}y").tokens == ["x", word, "y"]


def test_texts_are_cut_as_the_file_says(byte_level, caplog):
    cuts = {
        cut: [
            piece
            for piece, _ in gguf_tokenizer.byte_level(read_fields(byte_level(pre=cut))).pre_tokenizer.pre_tokenize_str(
                "a12345's"
            )
        ]
        for cut in ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")
    }
    assert cuts == {
        "gpt-2": ["a", "12345", "'s"],
        "smollm": ["a", "12345", "'s"],
        "llama-bpe": ["a", "123", "45", "'s"],
        "qwen2": ["a", "1", "2", "3", "4", "5", "'s"],
        "tekken": ["a", "1", "2", "3", "4", "5", "'s"],
    }
    assert not caplog.records
    gguf_tokenizer.byte_level(read_fields(byte_level(pre="somebody-elses")))
    [record] = caplog.records
    assert "cuts texts in the way of 'somebody-elses'" in record.getMessage()


@pytest.fixture
def pieces(fallback_tokenizer):
    """A GGUF file's fields of a SentencePiece vocabulary: a token's score is the rank of the merge that makes it."""
    parts = json.loads(fallback_tokenizer.backend_tokenizer.to_str())["model"]
    ranks = {"".join(merge): -float(at) for at, merge in reversed([*enumerate(parts["merges"])])}
    scores = [ranks.get(token, -1e4) for token in sorted(parts["vocab"], key=parts["vocab"].get)]
    return {
        "scores": scores,
        "token_type": [2, CONTROL, CONTROL] + [1] * (len(scores) - 3),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def tokenizer_of(path):
    fields = read_fields(path)
    made = PreTrainedTokenizerFast(
        tokenizer_object=gguf_tokenizer.build(fields), **gguf_tokenizer.special_tokens(fields)
    )
    gguf_tokenizer.check(made, fields)
    return made


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_a_sentencepiece_vocabulary_gives_the_ids_of_its_tokenizer(tmp_path, fallback_tokenizer, pieces, architecture):
    path = write_gguf(tmp_path / "a.gguf", fallback_tokenizer, "llama", architecture=architecture, **pieces)
    tokenizer = tokenizer_of(path)
    texts = (TEXTS[0], "a <end>", "東京 in 1987\n\n")
    assert [tokenizer(text)["input_ids"] for text in texts] == [fallback_tokenizer(text)["input_ids"] for text in texts]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(list(texts))["input_ids"] == tokenizer(list(texts))["input_ids"]
    path = write_gguf(path, fallback_tokenizer, "llama", **pieces, add_bos_token=False, add_space_prefix=False)
    assert tokenizer_of(path).tokenize("The bridge")[0] == "T"
    assert tokenizer_of(path)("The")["input_ids"][0] != 1


def test_gemma_writes_no_space_before_a_text_and_merges_in_the_order_of_its_tokens(
    tmp_path, fallback_tokenizer, pieces
):
    parts = json.loads(fallback_tokenizer.backend_tokenizer.to_str())["model"]
    merges = sorted(parts["merges"], key=lambda merge: parts["vocab"]["".join(merge)])
    # In Gemma's order: tokens of one merge stand in the order of the merges.
    assert ["".join(merge) for merge in merges] == ["".join(merge) for merge in parts["merges"]]
    inner = Tokenizer(models.BPE(parts["vocab"], [tuple(merge) for merge in merges], byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    path = write_gguf(
        tmp_path / "a.gguf", fallback_tokenizer, "llama", architecture="gemma2", **{**pieces, "scores": [0.0] * 320}
    )
    tokenizer = tokenizer_of(path)
    assert [tokenizer(text)["input_ids"][1:] for text in TEXTS[:2]] == [inner.encode(text).ids for text in TEXTS[:2]]


def test_a_vocabulary_without_merges_and_scores_is_refused(tmp_path, fallback_tokenizer, pieces):
    path = write_gguf(tmp_path / "a.gguf", fallback_tokenizer, "llama", **{**pieces, "scores": [1.0]})
    with pytest.raises(BadTokenizer, match="neither merges nor scores"):
        gguf_tokenizer.build(read_fields(path))


def test_a_tokenizer_that_is_not_the_files_is_refused(byte_level, random_tokenizer, bos_tokenizer):
    fields = read_fields(byte_level(bos_token_id=1, add_bos_token=False))
    gguf_tokenizer.check(random_tokenizer, fields)
    with pytest.raises(BadTokenizer, match="begins each text with '<unused>', which the file forbids"):
        gguf_tokenizer.check(bos_tokenizer, dataclasses.replace(fields, tokens=fields.tokens[: len(bos_tokenizer)]))
    with pytest.raises(BadTokenizer, match="320 tokens, the file has 321"):
        gguf_tokenizer.check(random_tokenizer, dataclasses.replace(fields, tokens=[*fields.tokens, "more"]))
    with pytest.raises(BadTokenizer, match=r"gives back .* for the text"):
        gguf_tokenizer.check(bos_tokenizer, dataclasses.replace(fields, tokens=["<unk>"], values={}))


def test_a_file_without_a_vocabulary_is_an_error_in_one_line(byte_level, monkeypatch):
    path = byte_level()
    monkeypatch.setattr(gguf_tokenizer, "_entries", lambda fields, name: [])
    with pytest.raises(ModelNotFound, match="holds no tokenizer: take a GGUF file with a vocabulary") as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_default_model_has_the_token_ids_it_always_had(tmp_path):
    fields = read_fields(resolve("smollm2-135m"))
    tokenizer = tokenizer_of(resolve("smollm2-135m"))
    texts = [*TEXTS, "<|im_start|>user\nHi<|im_end|>", "The mother tongue of Danielle Darrieux is"]
    assert fields.values["ggml.pre"] == "smollm"
    assert tokenizer(texts[-1])["input_ids"] == IDS
    assert hashlib.sha256(json.dumps(tokenizer(texts)["input_ids"]).encode()).hexdigest()[:16] == DIGEST
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"] == tokenizer(texts)["input_ids"]
