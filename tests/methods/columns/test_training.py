"""Choosing and training columns for many edits at once against the published procedure, one edit at a time."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastedit.methods.columns.config import TrainConfig
from fastedit.methods.columns.contributions import Slots, choose_slots, observe
from fastedit.methods.columns.training import train_columns, train_shared
from fastedit.methods.columns.training_pass import lowest_layers
from fastedit.model.adapter import ModelAdapter
from fastedit.model.tokens import whole_sequences

FAMILIES = ["gpt2", "pythia", "gpt-neox in sequence", "llama", "gptj"]
# transformers' RMSNorm, and GPT-J's attention, round to float32 inside a float64 model.
LOSS_BOUND = {"llama": 1e-5, "gptj": 1e-5}
PROMPTS = ["The twin of Tavisk is", "Rook", "The Orlen bridge is in the town of", "Because they teach", "I think"]
TARGETS = ["Pell", "said that Rook lives", "Tavisk", "silver", "in one day"]
LAYERS = range(2)
TRAIN = TrainConfig(steps=14, lr=0.1, stop_probability=0.03, repetition_factor=2.0)


@pytest.fixture
def adapter(request, family_models, random_tokenizer):
    return ModelAdapter(copy.deepcopy(family_models[request.param]).double().eval(), random_tokenizer)


def downs_of(adapter):
    return [layer.down for layer in adapter._layers]


def published(module, adapter, sequence, gate_only=False):
    settings = module.FineSettings(
        k=3,
        frozen=1,
        lr=TRAIN.lr,
        steps=TRAIN.steps,
        repeat=TRAIN.repetition_factor,
        stop=TRAIN.stop_probability,
        gate_only=gate_only,
    )
    gates = [layer.mlp.act_fn for layer in adapter.layers] if gate_only else []
    prompt = sequence.ids[: -len(sequence.targets)]
    return module.edit_one(adapter.model, downs_of(adapter), prompt, sequence.targets, settings, gates)


def choose_and_train(adapter, sequences, gate_only=False, config=TRAIN):
    with torch.no_grad(), adapter.packed():
        slots = choose_slots(adapter, sequences, 3, LAYERS, gate_only)
        return slots, train_columns(adapter, sequences, slots, config)


@pytest.mark.parametrize("adapter", FAMILIES, indirect=True)
def test_neurons_losses_and_stop_are_those_of_the_published_procedure(adapter, request, published_fine):
    bound = LOSS_BOUND.get(request.node.callspec.params["adapter"], 1e-9)
    sequences = whole_sequences(adapter.tokenizer, PROMPTS, TARGETS)
    slots, trained = choose_and_train(adapter, sequences)
    steps = []
    for edit, sequence in enumerate(sequences):
        wanted = published(published_fine, adapter, sequence)
        here = slots.edits == edit
        chosen = list(zip(slots.layers[here].tolist(), slots.neurons[here].tolist(), strict=True))
        assert chosen == wanted.slots
        torch.testing.assert_close(slots.scores[here], wanted.scores, rtol=bound, atol=bound)
        curve = torch.tensor([loss for loss, _ in wanted.losses], dtype=torch.float64)
        torch.testing.assert_close(trained.curve[: len(curve), edit], curve, rtol=bound, atol=0)
        assert trained.curve[len(wanted.losses) :, edit].isnan().all()
        assert trained.worst[edit] == pytest.approx(wanted.losses[-1][1], rel=bound)
        assert trained.steps[edit] == wanted.steps
        torch.testing.assert_close(trained.delta[here], wanted.delta, rtol=0, atol=1e3 * bound)
        steps.append(wanted.steps)
    assert len(set(steps)) > 1, "every edit took as many steps: compaction was not tried"


@pytest.mark.parametrize("adapter", ["llama"], indirect=True)
def test_the_released_score_leaves_the_up_projection_out(adapter, published_fine):
    sequences = whole_sequences(adapter.tokenizer, PROMPTS[:2], TARGETS[:2])
    slots, _ = choose_and_train(adapter, sequences, gate_only=True, config=TRAIN.model_copy(update={"steps": 1}))
    full, _ = choose_and_train(adapter, sequences, config=TRAIN.model_copy(update={"steps": 1}))
    for edit, sequence in enumerate(sequences):
        here = slots.edits == edit
        chosen = list(zip(slots.layers[here].tolist(), slots.neurons[here].tolist(), strict=True))
        assert chosen == published(published_fine, adapter, sequence, gate_only=True).slots
    assert slots.neurons.tolist() != full.neurons.tolist()


@pytest.mark.parametrize("token_budget", [1, 30, 1000])
def test_edits_together_are_edits_alone(random_adapter, token_budget):
    random_adapter.model.eval()
    sequences = whole_sequences(random_adapter.tokenizer, PROMPTS, TARGETS)
    slots, trained = choose_and_train(
        random_adapter, sequences, config=TRAIN.model_copy(update={"token_budget": token_budget})
    )
    for edit, sequence in enumerate(sequences):
        _, alone = choose_and_train(random_adapter, [sequence])
        torch.testing.assert_close(trained.delta[slots.edits == edit], alone.delta, rtol=1e-5, atol=1e-7)
        assert trained.steps[edit] == alone.steps[0]


def test_a_neuron_chosen_twice_is_trained_twice(random_adapter):
    """Both vectors act, and both get the gradient of their sum."""
    random_adapter.model.eval()
    (sequence,) = whole_sequences(random_adapter.tokenizer, PROMPTS[:1], TARGETS[:1])
    twice = Slots(torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([5, 5]), torch.zeros(2))
    config = TRAIN.model_copy(update={"norm_factor": 0.0, "steps": 1})
    with torch.no_grad(), random_adapter.packed():
        both = train_columns(random_adapter, [sequence], twice, config).delta
        one = train_columns(random_adapter, [sequence], twice.pick(torch.tensor([0])), config).delta
    assert torch.equal(both[0], both[1])
    torch.testing.assert_close(both[0], one[0])


def test_equal_scores_go_to_the_lowest_layer_and_neuron(random_adapter):
    random_adapter.model.eval()
    with torch.no_grad():
        for layer in range(4):
            random_adapter.down_weight(layer).zero_()
        sequences = whole_sequences(random_adapter.tokenizer, PROMPTS[:2], TARGETS[:2])
        with random_adapter.packed():
            slots = choose_slots(random_adapter, sequences, 3, range(1, 3))
    assert set(slots.layers.tolist()) == {1}
    assert slots.neurons.view(-1, 3).tolist() == [[0, 1, 2]] * (len(slots) // 3)


def test_a_given_token_changes_the_slots_of_the_first_position_only(random_adapter):
    random_adapter.model.eval()
    sequences = whole_sequences(random_adapter.tokenizer, PROMPTS[:2], TARGETS[:2])
    with torch.no_grad(), random_adapter.packed():
        own = observe(random_adapter, sequences, ()).greedy
        plain = choose_slots(random_adapter, sequences, 3, LAYERS)
        same = choose_slots(random_adapter, sequences, 3, LAYERS, tokens=[int(own[0]), None])
        other = choose_slots(random_adapter, sequences, 3, LAYERS, tokens=[(int(own[0]) + 5) % 300, None])
        small = choose_slots(random_adapter, sequences, 3, LAYERS, token_budget=1)
    assert torch.equal(plain.neurons, same.neurons)
    assert plain.neurons[:3].tolist() != other.neurons[:3].tolist()
    assert torch.equal(plain.neurons[3:], other.neurons[3:])
    assert torch.equal(plain.neurons, small.neurons)


def test_the_lowest_layers_are_where_edits_join():
    slots = Slots(torch.tensor([0, 0, 1, 2]), torch.tensor([3, 2, 0, 5]), torch.arange(4), torch.zeros(4))
    assert lowest_layers(slots, 3) == [2, 0, 5]


class NewShapes(TorchDispatchMode):
    """Collects the shapes of all tensors that operations return, except those in the storage of `known` tensors."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.shapes.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("train", [train_columns, train_shared])
def test_no_tensor_of_a_weights_size_is_made(random_adapter, train):
    random_adapter.model.eval()
    weight = random_adapter.down_weight(0)
    matrix = {tuple(weight.shape), tuple(weight.T.shape)}
    (sequence,) = whole_sequences(random_adapter.tokenizer, PROMPTS[:1], TARGETS[:1])
    slots = Slots(*(torch.tensor(part) for part in ([0] * 3, [1, 2, 2], [5, 9, 7], [0.0] * 3)))
    with NewShapes(random_adapter.model.parameters()) as created, torch.no_grad(), random_adapter.packed():
        train(random_adapter, [sequence], slots, TRAIN)
    assert (1, weight.shape[0]) in created.shapes or (2, weight.shape[0]) in created.shapes, "nothing was watched"
    assert not created.shapes & matrix
    inputs = torch.zeros(2, weight.shape[1], dtype=weight.dtype)
    with NewShapes(random_adapter.model.parameters()) as created:
        weight.requires_grad_()
        torch.autograd.grad((inputs @ weight.T).sum(), weight)
    assert created.shapes & matrix
