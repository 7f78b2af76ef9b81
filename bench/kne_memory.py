"""Memory of training KNE's ensemble on a random Llama model of a fraction of Llama-3-8B's shape.

    python bench/kne_memory.py --fraction 8

For n neurons the vectors, their gradient and Adam's two moments take 4 n d float32 numbers; training every
down-projection would take 4 L d d_ff. A peak is that of the whole process while it trains, less its peak before. The
first share runs twice, because its first run includes what is set up once.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from timing import machine_line, peak_mb, reset_peak
from transformers import LlamaConfig, LlamaForCausalLM

from fastedit.methods.columns.config import TrainConfig
from fastedit.methods.columns.contributions import Slots
from fastedit.methods.columns.ensemble import ensemble
from fastedit.methods.columns.training import train_shared
from fastedit.model.adapter import ModelAdapter
from fastedit.model.load import load_model
from fastedit.model.tokens import TokenSequence

FULL = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SHARES = (0.001, 0.01, 0.04, 0.16)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=int, default=8, help="of the widths; the layers are 8 of 32")
    parser.add_argument("--tokenizer", default="smollm2-135m", help="a model whose tokenizer is borrowed")
    return parser.parse_args()


def random_model(tokenizer: Any, fraction: int) -> ModelAdapter:
    """Eight random layers of Llama-3-8B's shape with its widths divided by `fraction`."""
    shape = {name: size // fraction for name, size in FULL.items()}
    shape["num_key_value_heads"] = max(1, shape["num_key_value_heads"])
    config = LlamaConfig(**shape, num_hidden_layers=8, vocab_size=4096)
    return ModelAdapter(LlamaForCausalLM(config).eval(), tokenizer)


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    # Held to the end: memory that it freed would be used again and hide the peaks.
    lender = load_model(options.tokenizer)
    model = random_model(lender.tokenizer, options.fraction)
    edits = [TokenSequence(tuple(range(i, i + 12)), -1, (10,), (i + 12,)) for i in range(8)]
    scores = torch.rand(model.n_layers, model.d_ff)
    matrices = 4 * 4 * model.n_layers * model.d_model * model.d_ff / 2**20

    print(machine_line())
    print(f"d_model {model.d_model}, d_ff {model.d_ff}, {model.n_layers} layers; 4 L d d_ff float32: {matrices:.0f} MB")
    for share in (SHARES[0], *SHARES):
        layers, neurons = ensemble(scores, share).unbind(1)
        slots = Slots(torch.zeros_like(layers), layers, neurons, scores[layers, neurons])

        reset_peak()
        before = peak_mb()
        with torch.no_grad(), model.packed():
            train_shared(model, edits, slots, TrainConfig(steps=5, reduce="mean", kl_factor=0, repetition_factor=0))
        peak = peak_mb() - before
        vectors = 4 * 4 * len(slots) * model.d_model / 2**20
        print(f"{len(slots):>6} neurons: peak {peak:6.1f} MB above the start; 4 n d float32 {vectors:6.1f} MB")


if __name__ == "__main__":
    main()
