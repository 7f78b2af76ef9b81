"""Makes the tiny language model that the tests edit, with its facts and its sample text.

    python tests/tiny/make_tiny_model.py [--out FOLDER]

It writes `model/` (a Llama-architecture model with its tokenizer, an ordinary Hugging Face folder, float32),
`facts.jsonl` (edit records about what the model knows) and `text.txt` (text of the same sort, not trained on).
One thread and fixed seeds: on one machine with one version of torch the result is the same bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from corpus import KINDS, World, make_subject
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 11
BOS, EOS = "<s>", "</s>"
VOCABULARY = 1000
LAYERS, D_MODEL, D_FF = 8, 64, 192
STEPS = 700
LEARNING_RATE = 4e-3
WARMUP = 40
WEIGHT_DECAY = 0.05
# Both shapes are 2048 tokens; the long one teaches positions past the usual prompt.
SHORT_BATCH, LONG_BATCH = (32, 64), (8, 256)
LONG_EVERY = 8
# The first decoder layer that may read about a subject from outside of it; one batch in `FREE_EVERY` is not masked.
READ_LAYER = 5
FREE_EVERY = 5
TEXT_CHARACTERS = 80_000


def train_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS in front.

    It is trained on text about other subjects than the model's, so that names are spelt with several tokens.
    """
    rng = random.Random(SEED + 1)
    kind_of = {subject: kind for kind in KINDS for subject in world.subjects[kind]}
    text = subject_pattern(world).sub(lambda found: make_subject(rng, kind_of[found[0]]), world.text(rng, 400_000))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=256
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=D_FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def subject_pattern(world: World) -> re.Pattern[str]:
    """Matches any subject of the world, the longest that fits."""
    subjects = sorted((s for group in world.subjects.values() for s in group), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, subjects)))


def make_batch(
    world: World, tokenizer: PreTrainedTokenizerFast, rng: random.Random, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh random text, every row cut to one length, and where its subjects stand.

    Returns:
        ids: (rows, length) int64.
        mention: (rows, length) int64, 0 outside subjects, else the number of the subject's mention in its row.
    """
    rows, length = LONG_BATCH if step % LONG_EVERY == LONG_EVERY - 1 else SHORT_BATCH
    pattern = subject_pattern(world)
    texts = [world.text(rng, 6 * length) for _ in range(rows)]
    encoded = tokenizer(texts, return_offsets_mapping=True)
    ids = torch.tensor([row[:length] for row in encoded["input_ids"]])
    mention = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        offsets = encoded["offset_mapping"][row][:length]
        for number, found in enumerate(pattern.finditer(text), start=1):
            for at, (first, end) in enumerate(offsets):
                if first < found.end() and end > found.start():
                    mention[row, at] = number
    return ids, mention


def attention_masks(mention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Additive masks (rows, 1, length, length) float32 for the layers below `READ_LAYER` and for those from it on.

    Below, the tokens of a subject see themselves and BOS and are seen by nothing else; from `READ_LAYER` on, they see
    all that is before them and the last of them is seen by all that follows. So what the model knows about a subject
    has to be gathered at its last token in the lower layers, which is where large language models keep it and where
    editing methods look for it.
    """
    length = mention.shape[1]
    following = torch.nn.functional.pad(mention[:, 1:], (0, 1))
    last = (mention > 0) & (mention != following)
    outside = mention == 0
    own = mention[:, :, None] == mention[:, None, :]
    own[:, :, 0] = True
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    lower, upper = own & causal, (own | outside[:, None, :] | last[:, None, :]) & causal
    minimum = torch.finfo(torch.float32).min
    return tuple(torch.zeros(m.shape).masked_fill(~m, minimum)[:, None] for m in (lower, upper))


@contextmanager
def masked_attention(model: LlamaForCausalLM, mention: torch.Tensor) -> Iterator[None]:
    """Within the block every decoder layer sees through `attention_masks`."""
    lower, upper = attention_masks(mention)

    def use(mask: torch.Tensor) -> Callable[..., Any]:
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask})

    layers = model.model.layers
    hooks = [
        layer.self_attn.register_forward_pre_hook(use(lower if number < READ_LAYER else upper), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def learning_rate(step: int) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return LEARNING_RATE * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    """Next-token training on every token of fresh random text."""
    rng = random.Random(SEED + 2)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    started = time.perf_counter()
    model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        ids, mention = make_batch(world, tokenizer, rng, step)
        with nullcontext() if step % FREE_EVERY == 0 else masked_attention(model, mention):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}  {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()


def main() -> None:
    """Makes everything and writes it."""
    parser = argparse.ArgumentParser(description="Make the tiny test model, its facts and its sample text.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write into")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    world = World(SEED)
    tokenizer = train_tokenizer(world)
    model = new_model(tokenizer)
    train(model, world, tokenizer)

    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    records = world.records(random.Random(SEED + 3))
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (out / "facts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sample = random.Random(SEED + 4)
    paragraphs = [world.text(sample, 600) for _ in range(TEXT_CHARACTERS // 600)]
    (out / "text.txt").write_text("\n".join(paragraphs) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
