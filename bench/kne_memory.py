"""Memory of training KNE's ensemble on a random Llama model of a fraction of Llama-3-8B's shape.

    python bench/kne_memory.py --fraction 8

The vectors, their gradient and Adam's two moments are 4 n d float32 for n neurons; a gradient of every down-projection
with Adam would be 4 L d d_ff. Peaks are of the whole process while it trains, less what it held before; the first line
is run twice, because what is set up once is in the first.
"""

from __future__ import annotations

import argparse

import torch
from timing import machine_line, peak_mb, reset_peak
from transformers import LlamaConfig, LlamaForCausalLM

from fastedit.methods.columns.config import TrainConfig
from fastedit.methods.columns.contributions import Slots
from fastedit.methods.columns.ensemble import ensemble
from fastedit.methods.columns.training import train_shared
from fastedit.model.load import load_model
from fastedit.model.tokens import TokenSequence

FULL = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SHARES = (0.001, 0.01, 0.04, 0.16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=int, default=8, help="of the widths; the layers are 8 of 32")
    parser.add_argument("--tokenizer", default="smollm2-135m", help="a model whose tokenizer is borrowed")
    options = parser.parse_args()
    torch.manual_seed(0)
    adapter = load_model(options.tokenizer)
    shape = {name: size // options.fraction for name, size in FULL.items()}
    shape["num_key_value_heads"] = max(1, shape["num_key_value_heads"])
    config = LlamaConfig(**shape, num_hidden_layers=8, vocab_size=4096)
    model = type(adapter)(LlamaForCausalLM(config).eval(), adapter.tokenizer)
    edits = [TokenSequence(tuple(range(i, i + 12)), -1, (10,), (i + 12,)) for i in range(8)]
    scores = torch.rand(model.n_layers, model.d_ff)
    matrices = 4 * 4 * model.n_layers * model.d_model * model.d_ff / 2**20
    print(machine_line())
    print(f"d_model {model.d_model}, d_ff {model.d_ff}, {model.n_layers} layers; 4 L d d_ff float32: {matrices:.0f} MB")
    for share in (SHARES[0], *SHARES):
        layers, neurons = ensemble(scores, share).unbind(1)
        slots = Slots(torch.zeros_like(layers), layers, neurons, scores[layers, neurons])
        reset_peak()
        held = peak_mb()
        with torch.no_grad(), model.packed():
            train_shared(model, edits, slots, TrainConfig(steps=5, reduce="mean", kl_factor=0, repetition_factor=0))
        wanted = 4 * 4 * len(slots) * model.d_model / 2**20
        print(
            f"{len(slots):>6} neurons: peak {peak_mb() - held:6.1f} MB over the start; 4 n d float32 {wanted:6.1f} MB"
        )


if __name__ == "__main__":
    main()
