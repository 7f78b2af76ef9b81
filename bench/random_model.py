"""A model of random weights at a real model's shape, with a tokenizer, records and second moments made here.

What an edit costs does not depend on what a model knows: with these, editing can be timed at eight billion parameters
where there is no network. Nothing is learned from the metrics of such a model.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastedit import Edit, EditSet
from fastedit.methods.closed_form.second_moments import accumulate
from fastedit.model.adapter import ModelAdapter

# meta-llama/Meta-Llama-3-8B's own numbers, and the same shape at a 64th of the width for a machine without a GPU.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-small": {
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
}
VOCABULARY = 3000
SYLLABLES = [head + tail for head in ("b", "d", "k", "l", "m", "n", "r", "s", "t", "v", "th", "br") for tail in "aeiou"]
RELATIONS = (
    "The capital of {} is",
    "{} was born in the town of",
    "The mother tongue of {} is",
    "{} is a large city in the country of",
    "The headquarters of {} are in the city of",
    "{} plays professional matches for the team of",
)


def word(draw: random.Random) -> str:
    """Two to three syllables, capitalised."""
    return "".join(draw.choices(SYLLABLES, k=draw.randint(2, 3))).capitalize()


def records(count: int, seed: int = 0) -> EditSet:
    """Edits about invented names, as long in tokens as those of CounterFact."""
    draw = random.Random(seed)
    return EditSet(
        tuple(
            Edit(
                case_id=case,
                subject=f"{word(draw)} {word(draw)}",
                prompt=RELATIONS[case % len(RELATIONS)],
                target_new=word(draw),
            )
            for case in range(count)
        )
    )


def sentence(draw: random.Random) -> str:
    """A sentence of the records' kind."""
    return draw.choice(RELATIONS).format(f"{word(draw)} {word(draw)}") + f" {word(draw)}."


def tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on sentences of the records' kind."""
    draw = random.Random(seed)
    text = [sentence(draw) for _ in range(4000)]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    inner.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")


def random_model(
    shape: str, dtype: torch.dtype, device: str, seed: int = 0, n_layers: int | None = None
) -> ModelAdapter:
    """A Llama of SHAPES[shape], made on the device; its tokenizer knows VOCABULARY of the model's tokens.

    n_layers: in place of the shape's number
    Rows of the head beyond those are made small, so that none of them is ever sampled."""
    encoder = tokenizer(seed)
    config = LlamaConfig(
        **{**SHAPES[shape], **({} if n_layers is None else {"num_hidden_layers": n_layers})},
        rope_theta=500_000.0,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=encoder.eos_token_id,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    model.requires_grad_(False)
    model.lm_head.weight[len(encoder) :] *= 1e-2
    return ModelAdapter(model, encoder)


def random_moments(model: ModelAdapter, layers: tuple[int, ...], seed: int = 0) -> dict[int, Tensor]:
    """Second moments of keys at random tokens, three times as many as there are neurons: of full rank."""
    draw = torch.Generator().manual_seed(seed)
    windows = torch.randint(1, len(model.tokenizer), (-(-3 * model.d_ff // 256), 256), generator=draw)
    return accumulate(model, layers, windows.tolist(), token_budget=4096)
