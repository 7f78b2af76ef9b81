"""Integrated gradients against hooks on the model's own forward; ensembles and the slots made of them."""

import copy

import pytest
import torch

from fastedit.methods.columns.attribution import integrated_gradients
from fastedit.methods.columns.config import KNEConfig, TrainConfig
from fastedit.methods.columns.contributions import Slots
from fastedit.methods.columns.ensemble import ensemble
from fastedit.methods.columns.kne import choose_ensemble
from fastedit.methods.columns.training import train_columns, train_shared
from fastedit.model.adapter import ModelAdapter
from fastedit.model.tokens import target_sequences, whole_sequences

PROMPTS = ["The twin of Tavisk is", "The Orlen bridge is in the town of", "I think"]
TARGETS = ["Pell", "Tavisk", "in one day"]


@pytest.fixture
def adapter(family_models, random_tokenizer):
    return ModelAdapter(copy.deepcopy(family_models["gpt2"]).double().eval(), random_tokenizer)


def sequences_of(adapter):
    return target_sequences(adapter.tokenizer, PROMPTS, TARGETS)


def attributions(adapter, **options):
    with torch.no_grad(), adapter.packed():
        return integrated_gradients(adapter, sequences_of(adapter), **{"steps": 3, **options})


def probabilities(adapter, sequence, hooks, places=None):
    """Summed probability of the targets at `places` (default: all), with forward hooks on the down-projections."""
    handles = [adapter._layers[layer].down.register_forward_pre_hook(hook) for layer, hook in hooks.items()]
    try:
        with torch.enable_grad():
            logits = adapter.model(input_ids=torch.tensor([sequence.ids])).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    odds = logits.softmax(-1)
    pairs = list(zip(sequence.scored, sequence.targets, strict=True))
    return sum(odds[p, t] for p, t in (pairs if places is None else [pairs[i] for i in places]))


def observed(adapter, sequence):
    """layer -> keys at every position, (n_tokens, d_ff)."""
    keys = {}
    hooks = {
        layer: (lambda _, inputs, layer=layer: keys.__setitem__(layer, inputs[0][0].detach().clone()))
        for layer in range(adapter.n_layers)
    }
    probabilities(adapter, sequence, hooks)
    return keys


def replacing(rows, content):
    """A hook that puts `content` in place of the keys at `rows`."""

    def hook(_, inputs):
        new = inputs[0].clone()
        new[0, rows] = content
        return (new,)

    return hook


def by_hooks(adapter, sequence, layers, steps, rows, places=None):
    """Attr of `layers`, whose activations at `rows` are replaced together by beta times what was observed."""
    keys = observed(adapter, sequence)
    total = {layer: torch.zeros(adapter.d_ff, dtype=torch.float64) for layer in layers}
    for r in range(steps):
        leaves = {layer: (keys[layer][rows] * (r + 0.5) / steps).requires_grad_() for layer in layers}
        hooks = {layer: replacing(rows, leaf) for layer, leaf in leaves.items()}
        score = probabilities(adapter, sequence, hooks, places)
        for layer, grad in zip(layers, torch.autograd.grad(score, list(leaves.values())), strict=True):
            total[layer] += (grad * keys[layer][rows]).sum(0) / steps
    return torch.stack([total[layer] for layer in layers])


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("path", ["layer", "joint"])
def test_scores_are_those_of_hooks_on_the_models_forward(adapter, path, everywhere):
    scores = attributions(adapter, path=path, everywhere=everywhere)
    for edit, sequence in enumerate(sequences_of(adapter)):
        rows = list(range(len(sequence.ids))) if everywhere else list(sequence.scored)
        layers = range(adapter.n_layers)
        if path == "joint":
            wanted = by_hooks(adapter, sequence, list(layers), 3, rows)
        else:
            wanted = torch.cat([by_hooks(adapter, sequence, [layer], 3, rows) for layer in layers])
        torch.testing.assert_close(scores[edit], wanted, rtol=1e-9, atol=1e-15)


def test_apart_scales_one_position_at_a_time(adapter):
    apart = attributions(adapter, tokens="apart")
    for edit, sequence in enumerate(sequences_of(adapter)):
        wanted = torch.zeros_like(apart[edit])
        for place, position in enumerate(sequence.scored):
            for layer in range(adapter.n_layers):
                wanted[layer] += by_hooks(adapter, sequence, [layer], 3, [position], [place])[0]
        torch.testing.assert_close(apart[edit], wanted, rtol=1e-9, atol=1e-15)
    assert not torch.allclose(apart, attributions(adapter))


def test_a_columns_attribution_is_that_of_its_activations(adapter):
    """<W[:, k], dP / dW[:, k]> = sum_p a[p, k] (W^T g_p)_k at every node: scaling columns scales activations."""
    scores = attributions(adapter, steps=2, everywhere=True)
    sequence = sequences_of(adapter)[0]

    for layer in range(adapter.n_layers):
        parameter = adapter.down_parameter(layer)
        before = parameter.detach().clone()
        wanted = torch.zeros(adapter.d_ff, dtype=torch.float64)
        for beta in (0.25, 0.75):
            parameter.data = before * beta
            parameter.requires_grad_(True)
            (grad,) = torch.autograd.grad(probabilities(adapter, sequence, {}), parameter)
            wanted += (adapter.oriented(layer, before) * adapter.oriented(layer, grad)).sum(0) / 2
        parameter.data = before

        torch.testing.assert_close(scores[0, layer], wanted, rtol=1e-9, atol=1e-16)


def test_the_scores_of_a_layer_sum_to_its_effect(adapter):
    """Completeness: with many nodes a layer's scores sum to P - P(with the layer's neurons set to zero)."""
    sequence = sequences_of(adapter)[0]
    scores = attributions(adapter, steps=400, tokens="together")[0]
    rows = list(sequence.scored)

    for layer in range(adapter.n_layers):
        silent = probabilities(adapter, sequence, {layer: replacing(rows, 0)})
        effect = probabilities(adapter, sequence, {}) - silent
        assert float(scores[layer].sum()) == pytest.approx(float(effect.detach()), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("path", ["layer", "joint"])
def test_nodes_run_together_give_the_scores_of_nodes_run_apart(adapter, path):
    alone, some, whole = (attributions(adapter, steps=6, path=path, row_budget=budget) for budget in (1, 25, 1000))
    torch.testing.assert_close(some, alone, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(whole, alone, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("options", [{"steps": 0}, {"path": "all"}, {"tokens": "each"}])
def test_wrong_options_are_named(adapter, options):
    with pytest.raises(ValueError, match="integrated_gradients: wanted"):
        attributions(adapter, **options)


def test_the_ensemble_lies_above_one_threshold_for_all_layers():
    scores = torch.arange(40.0).view(4, 10)
    scores[0, 3] = 100
    assert ensemble(scores, 0.1).tolist() == [[0, 3], [3, 7], [3, 8], [3, 9]]
    assert ensemble(scores, 0.001).tolist() == [[0, 3]]
    assert ensemble(-scores, 0.05).tolist() == [[0, 0], [0, 1]]
    assert ensemble(scores, 0.1, key_layers=1).tolist() == [[3, 6], [3, 7], [3, 8], [3, 9]]
    assert ensemble(scores, 0.1, key_layers=(0, 1)).tolist() == [[0, 3], [1, 7], [1, 8], [1, 9]]
    with pytest.raises(ValueError, match="key_layers must lie in 0-3"):
        ensemble(scores, 0.1, key_layers=(4,))


@pytest.mark.parametrize("kind", ["shared", "union", "own"])
def test_the_slots_of_a_batch(kind):
    scores = torch.zeros(2, 3, 10)
    scores[0, 1, 4], scores[0, 2, 0], scores[1, 1, 4], scores[1, 0, 7] = 5, 4, 1, 3
    slots = choose_ensemble(scores, KNEConfig(share=2 / 30, ensemble=kind, alpha=3.0))
    members = list(zip(slots.edits.tolist(), slots.layers.tolist(), slots.neurons.tolist(), strict=True))
    wanted = {
        "shared": [(0, 1, 4), (0, 2, 0)],
        "union": [(0, 0, 7), (0, 1, 4), (0, 2, 0)],
        "own": [(0, 1, 4), (0, 2, 0), (1, 0, 7), (1, 1, 4)],
    }
    assert members == wanted[kind]
    assert slots.scales.tolist() == [3.0] * len(slots)
    whole = choose_ensemble(scores, KNEConfig(share=2 / 30, ensemble=kind, alpha=3.0, alpha_per="all"))
    assert whole.scales[0] == pytest.approx(3 / (len(slots) / (2 if kind == "own" else 1)) ** 0.5)


def test_one_ensemble_for_one_edit_trains_like_its_own(random_adapter):
    random_adapter.model.eval()
    (sequence,) = whole_sequences(random_adapter.tokenizer, PROMPTS[:1], TARGETS[:1])
    slots = Slots(*(torch.tensor(part) for part in ([0] * 4, [1, 2, 2, 3], [5, 0, 9, 7], [0.0] * 4)))
    slots = Slots(slots.edits, slots.layers, slots.neurons, slots.scores, torch.tensor([0.5, 2.0, 2.0, 1.0]))
    config = TrainConfig(steps=6, lr=0.05, reduce="mean", norm_factor=0.2)
    with torch.no_grad(), random_adapter.packed():
        own = train_columns(random_adapter, [sequence], slots, config)
        shared = train_shared(random_adapter, [sequence], slots, config)
    torch.testing.assert_close(own.delta, shared.delta, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(own.curve, shared.curve, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("token_budget", [5, 1000])
def test_the_ensemble_follows_the_mean_loss_of_the_batch(random_adapter, token_budget):
    """One Adam step is a sign step: it follows the summed gradients, however edits are grouped."""
    random_adapter.model.eval()
    sequences = whole_sequences(random_adapter.tokenizer, PROMPTS, TARGETS)
    slots = Slots(*(torch.tensor(part) for part in ([0, 0], [1, 2], [5, 9], [0.0, 0.0])))
    settings = {"steps": 2, "lr": 1e-3, "reduce": "mean", "norm_factor": 0, "kl_factor": 0, "repetition_factor": 0}
    with torch.no_grad(), random_adapter.packed():
        one = train_shared(random_adapter, sequences, slots, TrainConfig(**settings, token_budget=token_budget))
        other = train_shared(random_adapter, sequences[::-1], slots, TrainConfig(**settings))
    torch.testing.assert_close(one.delta, other.delta, rtol=1e-4, atol=1e-7)
    assert one.curve[1].mean() < one.curve[0].mean()
