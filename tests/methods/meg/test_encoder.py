"""The encoder: pairs apart from the edits, negatives that are masked, and what training improves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import normalize

from fastedit.methods.meg.config import EncoderConfig
from fastedit.methods.meg.encoder import (
    Encoder,
    ModelTrunk,
    OtherTrunk,
    Wording,
    centre,
    contrastive_loss,
    n_epochs,
    nearest,
    train_encoder,
    training_pairs,
)
from fastedit.methods.meg.serve import make_encoder
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit, EditSet, Probe

CONFIG = EncoderConfig(layer=3, epochs=6, batch_size=16, lr=1e-3)


def test_pairs_are_apart_from_the_edits() -> None:
    edits = [Edit(prompt="{} lies in", subject="Orlen", target_new="Pell")]
    others = [
        Edit(prompt="{} was built in", subject="ORLEN", target_new="1900", rephrase_prompts=["When was {} built?"]),
        Edit(
            prompt="{} makes",
            subject="Vrudi",
            target_new="soap",
            rephrase_prompts=["a {}", "b {}", "c {}"],
            locality=[Probe(prompt="Torvo makes")],
        ),
        Edit(prompt="{} sells", subject="Vrudi", target_new="coal", rephrase_prompts=["d {}"]),
    ]
    assert training_pairs(others, edits) == [
        ("a Vrudi", "Vrudi makes", "Torvo makes"),
        ("b Vrudi", "Vrudi makes", "Torvo makes"),
    ]


def test_two_wordings_of_one_fact_are_not_each_others_negatives() -> None:
    vectors = normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    originals = vectors[[0, 0, 2, 3]]
    apart = torch.eye(4, dtype=torch.bool)
    same = apart.clone()
    same[0, 1] = same[1, 0] = True
    loss = contrastive_loss(vectors, originals, same, 0.1)
    scores = vectors @ originals.T / 0.1
    wanted = 0.0
    for i in range(4):
        kept = [j for j in range(4) if j == i or not same[i, j]]
        wanted += float(torch.logsumexp(scores[i, kept], 0) - scores[i, i]) / 4
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert float(contrastive_loss(vectors, originals, apart, 0.1)) > wanted + 0.1


def test_unrelated_prompts_are_wrong_answers() -> None:
    random = torch.Generator().manual_seed(1)
    anchors, candidates = torch.randn(3, 8, generator=random), torch.randn(5, 8, generator=random)
    same = torch.zeros(3, 5, dtype=torch.bool)
    # The last unrelated prompt is word for word what the first record asks.
    same[0, 4] = True
    loss = contrastive_loss(anchors, candidates, same, 0.1)
    cosines = normalize(anchors, dim=1) @ normalize(candidates, dim=1).T / 0.1
    wanted = [float(torch.logsumexp(cosines[i, : 4 if i == 0 else 5], 0) - cosines[i, i]) for i in range(3)]
    assert float(loss) == pytest.approx(sum(wanted) / 3, rel=1e-5)


def test_at_temperature_one_the_loss_has_the_published_floor() -> None:
    n = 400
    identical = torch.eye(n)
    floor = float(contrastive_loss(identical, identical, torch.eye(n, dtype=torch.bool), 1.0))
    assert floor == pytest.approx(math.log(1 + (n - 1) * math.exp(-1)), rel=1e-3)
    assert float(contrastive_loss(identical, identical, torch.eye(n, dtype=torch.bool), 0.05)) < 1e-4


def test_training_brings_wordings_of_unseen_facts_together(
    tiny_model: ModelAdapter, few_edits: EditSet, other_edits: EditSet
) -> None:
    before = {name: value.clone() for name, value in tiny_model.model.state_dict().items()}
    encoder = make_encoder(tiny_model, CONFIG)
    pairs = training_pairs(other_edits, few_edits)
    centre(encoder, [pair.original for pair in pairs])

    def gap() -> float:
        """How much nearer a paraphrase's own edit is than another one, in standard deviations of a unit sphere."""
        own = encoder([e.prompt for e in few_edits])
        asked = encoder([e.rephrase_prompts[0] for e in few_edits])
        scores = asked @ own.T
        others = scores[~torch.eye(len(scores), dtype=torch.bool)]
        return float((scores.diagonal().mean() - others.mean()) / others.std())

    untrained = gap()
    losses = train_encoder(encoder, pairs, CONFIG, seed=0)
    assert len(losses) == n_epochs(pairs, CONFIG) * (len(pairs) // CONFIG.batch_size)
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert gap() > 1.1 * untrained
    # The edited model itself is not touched.
    for name, value in tiny_model.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_only_the_last_layer_learns_and_comes_back(tiny_model: ModelAdapter, other_edits: EditSet) -> None:
    encoder = make_encoder(tiny_model, CONFIG)
    pairs = training_pairs(other_edits[:20], [])
    centre(encoder, [pair.original for pair in pairs])
    train_encoder(encoder, pairs, CONFIG.model_copy(update={"epochs": 1}), seed=0)
    texts = [pair.original for pair in pairs[:5]]
    state = encoder.state()
    assert {name.split(".")[0] for name in state} == {"last", "weigh", "mean"}
    # Some tokens say more about a fact than others.
    assert bool((state["weigh.weight"] != 0).any())
    again = make_encoder(tiny_model, CONFIG)
    assert not torch.allclose(again(texts), encoder(texts), atol=1e-3)
    again.load(state)
    assert torch.equal(again(texts), encoder(texts))
    assert torch.allclose(encoder(texts).norm(dim=1), torch.ones(5))


def test_few_pairs_are_gone_through_more_often() -> None:
    pairs = [Wording("a", "b", None)] * 40
    assert n_epochs(pairs, EncoderConfig(batch_size=2, epochs=3)) == 3
    assert n_epochs(pairs, EncoderConfig(batch_size=16, epochs=3)) == 20
    assert n_epochs(pairs[:5], EncoderConfig(batch_size=16, epochs=3)) == 40


def test_untrained_vectors_are_the_models_own_states(tiny_model: ModelAdapter) -> None:
    texts = ["Vrudi was built to make soap", "The royal colour of Logan"]
    trunk = ModelTrunk(tiny_model, 3)
    with torch.no_grad():
        vectors = trunk.pool(trunk.states(texts))
    for text, vector in zip(texts, vectors, strict=True):
        ids = torch.tensor([tiny_model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = tiny_model.model(input_ids=ids, output_hidden_states=True).hidden_states[4][0]
        states = states / states.square().mean(1, keepdim=True).add(1e-6).sqrt()
        torch.testing.assert_close(vector, states.mean(0), rtol=1e-3, atol=1e-4)


@pytest.fixture
def bert(tiny_parts: tuple[Any, Any]) -> Any:
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return transformers.BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_encoders_of_another_make(bert: Any, tiny_parts: tuple[Any, Any], pooling: str) -> None:
    tokenizer = tiny_parts[1]
    texts = ["Vrudi was built to make soap", "The royal colour"]
    trunk = OtherTrunk(bert, tokenizer, pooling)
    with torch.no_grad():
        vectors = trunk.pool(trunk.states(texts))
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            states = bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        wanted = states[0] if pooling == "cls" else states.mean(0)
        torch.testing.assert_close(vector, wanted, rtol=1e-4, atol=1e-5)
    encoder = Encoder(trunk)
    before = encoder(texts)
    train_encoder(
        encoder,
        [Wording("one", texts[0], None), Wording("two", texts[1], "three")],
        EncoderConfig(epochs=2, batch_size=2),
        seed=0,
    )
    assert not torch.equal(encoder(texts), before)


def test_wrong_encoders_are_named(tiny_model: ModelAdapter, tiny_parts: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"encoder.layer must lie in 1-7, got 8"):
        ModelTrunk(tiny_model, 8)
    with pytest.raises(ValueError, match=r"has no encoder.layer"):
        OtherTrunk(tiny_parts[0], tiny_parts[1], "cls")


def test_nearest_is_by_cosine() -> None:
    keys = torch.eye(3)
    scores, index = nearest(normalize(torch.tensor([[0.1, 0.9, 0.2]]), dim=1), keys)
    assert index.tolist() == [1]
    assert float(scores[0]) == pytest.approx(0.9 / (0.01 + 0.81 + 0.04) ** 0.5)
