"""A tiny random model and two tokenizers that are made here, in a second."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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
