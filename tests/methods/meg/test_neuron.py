"""The side branch: no effect at w = 0, equal to an enlarged matrix, with the gradient of its formula."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastedit.methods.meg.neuron import NeuronForm, attached, pull_back, respond
from fastedit.methods.meg.passes import UpperRows
from fastedit.model.adapter import ModelAdapter
from fastedit.model.logits import LogitBuffer
from fastedit.model.tokens import TokenSequence

LAYER = 1


def batch(model: ModelAdapter, n: int = 3) -> Tensor:
    return torch.randint(2, 900, (n, 7), generator=torch.Generator().manual_seed(3))


def logits(model: ModelAdapter, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.model(input_ids=ids).logits


def random_neurons(form: NeuronForm, n: int, size: float = 0.5) -> Tensor:
    return size * torch.randn(n, form.size, generator=torch.Generator().manual_seed(4))


def test_zero_neurons_change_no_bit(either_model: ModelAdapter) -> None:
    form, ids = NeuronForm.of(either_model), batch(either_model)
    base = logits(either_model, ids)
    with attached(either_model, LAYER, form, torch.zeros(3, form.size), torch.ones(3, dtype=torch.bool)):
        assert torch.equal(logits(either_model, ids), base)


def test_rows_without_a_neuron_keep_every_bit(either_model: ModelAdapter) -> None:
    form, ids = NeuronForm.of(either_model), batch(either_model)
    base = logits(either_model, ids)
    with attached(either_model, LAYER, form, random_neurons(form, 3), torch.tensor([False, True, False])):
        edited = logits(either_model, ids)
    assert torch.equal(edited[[0, 2]], base[[0, 2]])
    assert not torch.allclose(edited[1], base[1], atol=1e-2)
    assert torch.equal(logits(either_model, ids), base)


def enlarged_plain(model: ModelAdapter, form: NeuronForm, neuron: Tensor) -> ModelAdapter:
    """GPT-2 with one more neuron in the matrices of a layer."""
    read, bias, write = form.split(neuron[None])
    twin = copy.deepcopy(model.model)
    mlp = twin.transformer.h[LAYER].mlp
    assert bias is not None
    mlp.c_fc.weight = nn.Parameter(torch.cat([mlp.c_fc.weight, read.T], 1))
    mlp.c_fc.bias = nn.Parameter(torch.cat([mlp.c_fc.bias, bias]))
    mlp.c_fc.nf += 1
    mlp.c_proj.weight = nn.Parameter(torch.cat([mlp.c_proj.weight, write], 0))
    return ModelAdapter(twin, model.tokenizer)


class EnlargedLlama(nn.Module):
    """Llama's feed-forward with one more column in its down-projection, fed by a linear map of its input."""

    def __init__(self, mlp: nn.Module, read: Tensor, write: Tensor) -> None:
        super().__init__()
        self.mlp, self.read = mlp, read
        self.weight = torch.cat([mlp.down_proj.weight, write.T], 1)

    def forward(self, z: Tensor) -> Tensor:
        keys = self.mlp.act_fn(self.mlp.gate_proj(z)) * self.mlp.up_proj(z)
        return torch.cat([keys, z @ self.read.T], -1) @ self.weight.T


def test_branch_is_the_enlarged_matrix_of_a_plain_layer(plain_model: ModelAdapter) -> None:
    form, ids = NeuronForm.of(plain_model), batch(plain_model, 1)
    assert (form.activation, form.size) == ("gelu_tanh", 65)
    neuron = random_neurons(form, 1)
    with attached(plain_model, LAYER, form, neuron, torch.tensor([True])):
        edited = logits(plain_model, ids)
    wanted = logits(enlarged_plain(plain_model, form, neuron[0]), ids)
    assert (edited - wanted).abs().max() < 1e-5
    assert (edited - logits(plain_model, ids)).abs().max() > 1e-2


def test_branch_is_the_enlarged_matrix_of_a_gated_layer(tiny_model: ModelAdapter) -> None:
    form, ids = NeuronForm.of(tiny_model), batch(tiny_model, 1)
    assert (form.activation, form.size) == ("identity", 128)
    neuron = random_neurons(form, 1)
    with attached(tiny_model, LAYER, form, neuron, torch.tensor([True])):
        edited = logits(tiny_model, ids)
    read, _, write = form.split(neuron)
    twin = copy.deepcopy(tiny_model.model)
    twin.model.layers[LAYER].mlp = EnlargedLlama(twin.model.layers[LAYER].mlp, read, write)
    with torch.no_grad():
        wanted = twin(input_ids=ids).logits
    assert (edited - wanted).abs().max() < 1e-5
    assert (edited - logits(tiny_model, ids)).abs().max() > 1e-2


def test_packed_pass_is_the_hooked_model(either_model: ModelAdapter) -> None:
    form, ids = NeuronForm.of(either_model), batch(either_model)
    flat, active = random_neurons(form, 3), torch.ones(3, dtype=torch.bool)
    with attached(either_model, LAYER, form, flat, active):
        wanted = logits(either_model, ids)
    lengths = (7, 4, 6)
    sequences = [
        TokenSequence(tuple(row[:length].tolist()), -1, (length - 2, length - 1), (0, 0))
        for row, length in zip(ids, lengths, strict=True)
    ]
    with torch.no_grad(), either_model.packed():
        rows = UpperRows.start(either_model, sequences, LAYER)
        read = rows.run(either_model, respond(form, flat, rows.inputs, rows.owner).output)
        edited = LogitBuffer().logits(read, either_model.head).view(3, 2, -1)
    for i, length in enumerate(lengths):
        assert (edited[i] - wanted[i, length - 2 : length]).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("activation", ["identity", "silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradient_formula_is_autograd(activation: str, bias: bool) -> None:
    form = NeuronForm(6, activation, bias)
    random = torch.Generator().manual_seed(1)
    flat = torch.randn(3, form.size, generator=random, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(11, 6, generator=random, dtype=torch.float64)
    grad = torch.randn(11, 6, generator=random, dtype=torch.float64)
    owner = torch.tensor([0] * 4 + [1] * 2 + [2] * 5)
    response = respond(form, flat, inputs, owner)
    (wanted,) = torch.autograd.grad(response.output, flat, grad)
    pulled = pull_back(form, flat.detach(), inputs, owner, response.sums.detach(), grad)
    torch.testing.assert_close(pulled, wanted)


def test_a_batch_may_be_repeated_but_not_cut(tiny_model: ModelAdapter) -> None:
    form, ids = NeuronForm.of(tiny_model), batch(tiny_model, 2)
    flat, active = random_neurons(form, 2), torch.tensor([True, False])
    with attached(tiny_model, LAYER, form, flat, active):
        once = logits(tiny_model, ids)
        twice = logits(tiny_model, ids.repeat_interleave(2, 0))
        torch.testing.assert_close(twice[::2], once)
        with pytest.raises(ValueError, match="neurons for 2 rows cannot serve a batch of 3"):
            logits(tiny_model, batch(tiny_model, 3))


def test_shared_draw_lies_in_the_published_bounds() -> None:
    form = NeuronForm(400, "gelu_tanh", True)
    drawn = form.draw(1600, seed=42)
    read, bias, write = form.split(drawn[None])
    assert read.abs().max() <= 1 / 400**0.5
    assert bias is not None
    assert write.abs().max() <= 1 / 1601**0.5
    assert 0.6 < drawn.norm() < 0.7
    assert torch.equal(drawn, form.draw(1600, seed=42))
    assert not torch.equal(drawn, form.draw(1600, seed=43))


def test_wrong_arguments_are_named(tiny_model: ModelAdapter) -> None:
    form = NeuronForm.of(tiny_model)
    with pytest.raises(ValueError, match="activation must be one of"):
        NeuronForm(4, "tanh")
    with pytest.raises(ValueError, match="'auto', 'model' or 'identity'"):
        NeuronForm.of(tiny_model, "silu")
    with pytest.raises(ValueError, match=r"wanted shape \(n, 128\), got \(2, 5\)"):
        form.split(torch.zeros(2, 5))
    with (
        pytest.raises(ValueError, match="active must be bool"),
        attached(tiny_model, LAYER, form, torch.zeros(2, 128), torch.ones(2)),
    ):
        pytest.fail("entered")
