"""Models with a plain and with a gated feed-forward, small settings, and a store made once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastedit.methods.meg import MeG, MegConfig
from fastedit.methods.meg.config import EncoderConfig, FamiliarityConfig, FitConfig, GeneratorConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import EditSet

N_EDITS = 12

SMALL = MegConfig(
    fit=FitConfig(layer=4, steps=60, template="{}", ending=""),
    encoder=EncoderConfig(layer=3, epochs=4, batch_size=16, lr=1e-3),
    gate=FamiliarityConfig(blocks=2, epochs=200, batch_size=8),
    generator=GeneratorConfig(
        patch=32, width=64, blocks=1, heads=4, epochs=150, batch_size=12, lr=2e-3, judge_every=10
    ),
    max_new_tokens=8,
)


@pytest.fixture(scope="session")
def tiny_parts(tiny_parts: tuple[Any, Any]) -> tuple[Any, Any]:
    """The tiny model with a full stop as its end token: it was trained without one, and a single neuron cannot make it
    produce a token it never saw."""
    model, tokenizer = (copy.deepcopy(part) for part in tiny_parts)
    tokenizer.eos_token = "."
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


@pytest.fixture(scope="session")
def plain_once(tiny_parts: tuple[Any, Any]) -> Any:
    """A random GPT-2 for the tiny tokenizer: its feed-forward has biases, GELU and no gate."""
    config = transformers.GPT2Config(
        vocab_size=1000, n_embd=32, n_inner=48, n_layer=3, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = transformers.GPT2LMHeadModel(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.3)
    return model.requires_grad_(False)


@pytest.fixture
def plain_model(plain_once: Any, tiny_parts: tuple[Any, Any]) -> ModelAdapter:
    """A fresh copy of it."""
    return ModelAdapter(copy.deepcopy(plain_once), tiny_parts[1])


@pytest.fixture(params=["gated", "plain"])
def either_model(request: pytest.FixtureRequest) -> ModelAdapter:
    """A Llama, then a GPT-2."""
    return request.getfixturevalue({"gated": "tiny_model", "plain": "plain_model"}[request.param])


@pytest.fixture(scope="session")
def few_edits(tiny_facts: EditSet) -> EditSet:
    """The edits that are fitted."""
    return tiny_facts[:N_EDITS]


@pytest.fixture(scope="session")
def other_edits(tiny_facts: EditSet) -> EditSet:
    """Records that are not edited."""
    return tiny_facts[N_EDITS:120]


@pytest.fixture(scope="session")
def meg_folder(
    tiny_parts: tuple[Any, Any], few_edits: EditSet, other_edits: EditSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run of SMALL: every stage's file and the store. Copy it, do not write to it."""
    folder = tmp_path_factory.mktemp("meg")
    model, tokenizer = tiny_parts
    MeG(ModelAdapter(copy.deepcopy(model), tokenizer), config=SMALL, progress=False).edit(
        few_edits, other_edits, folder
    )
    return folder


@pytest.fixture
def make_meg(tiny_parts: tuple[Any, Any]) -> Callable[..., MeG]:
    """Makes MeG objects on fresh copies of the tiny model; keyword arguments replace parts of SMALL."""

    def make(method: str = "meg", **changes: Any) -> MeG:
        model, tokenizer = tiny_parts
        config = SMALL.model_copy(update=changes)
        return MeG(ModelAdapter(copy.deepcopy(model), tokenizer), method, config, progress=False)

    return make


@pytest.fixture
def meg(make_meg: Callable[..., MeG], meg_folder: Path, few_edits: EditSet, other_edits: EditSet) -> MeG:
    """A fresh model with the finished run of SMALL."""
    made = make_meg()
    made.load(meg_folder / "meg.safetensors")
    return made
