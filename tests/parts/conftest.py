"""Tiny random models of every family and tokenizers of several kinds, all made here, in seconds."""

import copy
import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastedit.adapter import ModelAdapter

VOCABULARY = 320

SENTENCES = (
    "The Orlen bridge is in the town of Tavisk, which lies on the river Pell.",
    "The twin of Tavisk is Pell. The capital of Żubrówka is Łomża.",
    "Rook said that Rook lives in the old house near the Orlen bridge.",
    "Therefore the master of the guild burns coal, and the miners dig for silver.",
    "Because they teach their children to speak, I think you should learn Old Norse.",
    "In one day 東京 grew rich. It was a new city. A baker is a person. This is a test.",
    "When he and she go out, we stay at home, but they do not.",
)


@pytest.fixture(scope="session")
def random_tokenizer():
    """Byte-level BPE, no beginning-of-text token; a token's offsets include the space before its word."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<pad>", "<unused>", "<end>"]
    )
    inner.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


@pytest.fixture(scope="session")
def bos_tokenizer():
    """BPE over words marked by a metaspace, and a beginning-of-text token in front of every text."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<unk>", "<start>", "<end>"])
    inner.train_from_iterator(SENTENCES, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<start>", eos_token="<end>", pad_token="<end>"
    )


@pytest.fixture(scope="session")
def fallback_tokenizer():
    """Llama 2's way: spaces become metaspaces before anything is split, one stands in front of the text, a character
    that is not in the vocabulary falls apart into its bytes, and a beginning-of-text token comes first."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 256, special_tokens=["<unk>", "<start>", "<end>"])
    inner.train_from_iterator([text.encode("ascii", "ignore").decode() for text in SENTENCES], trainer)
    made = json.loads(inner.to_str())
    vocabulary = made["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    made["model"].update(byte_fallback=True, fuse_unk=True)
    inner = Tokenizer.from_str(json.dumps({**made, "pre_tokenizer": None}))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<start>", eos_token="<end>", pad_token="<end>"
    )


@pytest.fixture(scope="session")
def llama_once():
    """The model that every test copies; nothing may change it."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = LlamaForCausalLM(config).double().eval()
        # Norms are made of ones, which would hide a norm that is left out or used twice.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def random_llama(llama_once):
    """float64 Llama of random weights: 4 layers, d_model 32, d_ff 48, 4 heads on 2 kv heads, end of text = 2."""
    return copy.deepcopy(llama_once)


@pytest.fixture
def random_adapter(random_llama, random_tokenizer):
    """The random model behind the byte-level tokenizer; gradients into its weights are allowed."""
    return ModelAdapter(random_llama, random_tokenizer)


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
GEMMA = {**GATED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 40}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PLAIN = {**SIZES, "n_inner": 48, "initializer_range": 0.2}
NEOX = {**SIZES, "intermediate_size": 48, "initializer_range": 0.2, "hidden_dropout": 0.2}
OPT = {**SIZES, "ffn_dim": 48, "init_std": 0.2}

# name: config class and its settings. Caps are low and rotary angles differ, so that leaving one out
# shows; dropouts are left where a family has them.
FAMILY_MODELS = {
    "llama": ("LlamaConfig", {**GATED, "attention_bias": True}),
    "mistral": ("MistralConfig", {**GATED, "sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {**GATED, "hidden_act": "gelu"}),
    "qwen3": ("Qwen3Config", {**GATED, "head_dim": 16}),
    "phi3": ("Phi3Config", {**GATED, "resid_pdrop": 0.2}),
    "gemma2": ("Gemma2Config", {**GEMMA, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "layer_types": KINDS, "final_logit_softcapping": 3.0}),
    "gemma3 with images": ("Gemma3Config", {"text_config": {**GEMMA, "layer_types": KINDS}, "vision_config": VISION}),
    "gpt2": ("GPT2Config", {**PLAIN, "scale_attn_by_inverse_layer_idx": True}),
    "gptj": ("GPTJConfig", {**PLAIN, "rotary_dim": 4}),
    "pythia": ("GPTNeoXConfig", NEOX),
    "gpt-neox in sequence": ("GPTNeoXConfig", {**NEOX, "use_parallel_residual": False}),
    "opt": ("OPTConfig", OPT),
    "opt-350m": ("OPTConfig", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 24}),
}


@pytest.fixture(scope="session")
def family_models():
    """One model per family, to be copied; every norm and bias drawn, so that none can be left out unseen."""
    made = {}
    with torch.random.fork_rng(devices=[]):
        for name, (kind, settings) in FAMILY_MODELS.items():
            torch.manual_seed(7)
            config = getattr(transformers, kind)(**copy.deepcopy(settings))
            attention = "eager" if "attn_logit_softcapping" in settings else None
            model = made[name] = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            for part, parameter in model.named_parameters():
                # Gemma's norms multiply by one plus their weight.
                if parameter.ndim == 1 and part.endswith("weight"):
                    parameter.data.uniform_(*(-0.5, 0.5) if "gemma" in name else (0.5, 1.5))
                elif parameter.ndim == 1:
                    parameter.data.normal_(std=0.3)
    return made


@pytest.fixture(params=FAMILY_MODELS)
def family(request):
    """Name of a model in FAMILY_MODELS."""
    return request.param


@pytest.fixture
def family_adapter(family, family_models, random_tokenizer):
    """A fresh float32 model of the family, in training mode as its config makes it: 3 layers, d_model 32, d_ff 48."""
    return ModelAdapter(copy.deepcopy(family_models[family]), random_tokenizer)
