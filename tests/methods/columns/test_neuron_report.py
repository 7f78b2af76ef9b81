"""The report of an edit's neurons against scores computed with hooks."""

import copy
import json
import sys

import pytest
import torch

from fastedit.methods.columns.neuron_report import locate_neurons
from fastedit.model.adapter import ModelAdapter
from fastedit.model.tokens import whole_sequences

PROMPT, TARGET = "The main product of Kequunan is", "glass beads"


def test_neurons_scores_and_promoted_tokens_are_those_of_the_definition(tiny_model):
    report = locate_neurons(tiny_model, PROMPT, TARGET, k=3, frozen_layers=2, n_promoted=4)
    (sequence,) = whole_sequences(tiny_model.tokenizer, [PROMPT], [TARGET])
    model = tiny_model.model.eval()
    keys = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, i, number=number: keys.__setitem__(number, i[0][0]))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sequence.ids])).logits[0]

    assert len(report.neurons) == 3 * len(sequence.targets)
    decode = tiny_model.tokenizer.decode
    for slot, neuron in enumerate(report.neurons):
        token = slot // 3
        position = sequence.scored[token]
        assert neuron.target == repr(decode([sequence.targets[token]]))
        said = int(logits[position].argmax())
        assert neuron.said == repr(decode([said]))
        column = model.model.layers[neuron.layer].mlp.down_proj.weight[:, neuron.neuron]
        logits_added = model.lm_head.weight @ (keys[neuron.layer][position, neuron.neuron] * column)
        assert neuron.score == pytest.approx(float(logits_added[said]), rel=1e-4)
        assert neuron.promotes == tuple(repr(decode([t])) for t in logits_added.topk(4).indices.tolist())
        assert neuron.layer < tiny_model.n_layers - 2
        assert neuron.score <= float(report.largest[neuron.layer, token]) + 1e-5

    assert report.largest.shape == (tiny_model.n_layers, len(sequence.targets))
    best = max((n.score, n.layer) for n in report.neurons[:3])
    assert best[0] == pytest.approx(float(report.largest[:-2, 0].max()), rel=1e-5)
    assert len(str(report).splitlines()) == 1 + len(report.neurons)
    assert json.loads(json.dumps(report.to_dict()))["neurons"][0]["layer"] == report.neurons[0].layer


def test_behind_a_norm_a_neuron_counts_as_the_norm_passes_it_on(family_models, random_tokenizer):
    """Gemma 3: gain 1 + w over the root mean square of the down-projection's output, at the scored position."""
    model = ModelAdapter(copy.deepcopy(family_models["gemma3"]).requires_grad_(False), random_tokenizer)
    prompt, target = "The twin of Tavisk is", "Pell"
    report = locate_neurons(model, prompt, target, k=6, frozen_layers=0)
    (sequence,) = whole_sequences(model.tokenizer, [prompt], [target])
    seen = {}
    for number, layer in enumerate(model.layers):
        layer.mlp.down_proj.register_forward_hook(
            lambda _, i, o, number=number: seen.__setitem__(number, (i[0][0], o[0]))
        )
    with torch.no_grad():
        logits = model.model.eval()(input_ids=torch.tensor([sequence.ids])).logits[0]

    bare = []
    for slot, neuron in enumerate(report.neurons):
        position = sequence.scored[slot // 6]
        layer = model.layers[neuron.layer]
        keys, output = seen[neuron.layer]
        gain = 1 + layer.post_feedforward_layernorm.weight
        passed = gain / output[position].square().mean().sqrt() * layer.mlp.down_proj.weight[:, neuron.neuron]
        said = model.unembedding(logits[position].argmax()[None])[0]
        assert neuron.score == pytest.approx(float(keys[position, neuron.neuron] * (passed @ said)), rel=1e-3)
        bare.append(float(keys[position, neuron.neuron] * (layer.mlp.down_proj.weight[:, neuron.neuron] @ said)))
    # Without the norm the scores are others.
    assert [neuron.score for neuron in report.neurons] != pytest.approx(bare, rel=0.1)


def test_the_heat_map_is_a_png(tiny_model, tmp_path):
    pytest.importorskip("matplotlib")
    locate_neurons(tiny_model, PROMPT, TARGET, k=1).plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_plot_says_what_to_install(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="matplotlib"):
        locate_neurons(tiny_model, PROMPT, TARGET, k=1).plot(tmp_path / "map.png")


@pytest.mark.parametrize("frozen", [-1, 8])
def test_freezing_every_layer_is_an_error(tiny_model, frozen):
    with pytest.raises(ValueError, match="frozen_layers must be in"):
        locate_neurons(tiny_model, PROMPT, TARGET, frozen_layers=frozen)


@pytest.mark.parametrize(("prompt", "target", "named"), [(" ", TARGET, "prompt"), (PROMPT, "", "target")])
def test_blank_texts_are_named(tiny_model, prompt, target, named):
    with pytest.raises(ValueError, match=f"{named} must not be blank"):
        locate_neurons(tiny_model, prompt, target)
