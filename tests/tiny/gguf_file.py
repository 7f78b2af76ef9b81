"""Writes the tiny model as a GGUF file, as llama.cpp's converter would, with its weights in eight bits."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_tiny_gguf(model: Path, path: Path, metadata: dict[str, str] | None = None) -> None:
    """model: the folder of a Llama with a byte-level tokenizer; metadata: further text fields"""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, "llama")

    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    for name, text in (metadata or {}).items():
        writer.add_string(name, text)

    _add_tokenizer(writer, json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"], config)
    _add_tensors(writer, model, config)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, inner: dict, config: dict) -> None:
    tokens = sorted(inner["vocab"], key=inner["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in inner["merges"]]
    special = {config["bos_token_id"], config["eos_token_id"]}

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(True)


def _add_tensors(writer: gguf.GGUFWriter, model: Path, config: dict) -> None:
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}

    for name, tensor in load_file(model / "model.safetensors").items():
        _, kind, *rest = name.removesuffix(".weight").split(".")
        if kind == "layers":
            number, inner = rest[0], ".".join(rest[1:])
            place = f"blk.{number}.{NAMES[inner]}.weight"
            tensor = _interleaved(tensor, heads[inner]) if inner in heads else tensor
        else:
            place = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[kind]

        if tensor.ndim == 1:
            writer.add_tensor(place, tensor)
        else:
            packed = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(place, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)


def _interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of llama.cpp's rotary embedding."""
    size = weight.shape[0] // n_heads // 2
    return weight.reshape(n_heads, 2, size, -1).swapaxes(1, 2).reshape(weight.shape)
