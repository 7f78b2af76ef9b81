"""The generator: the published size, memorising, continuing bit for bit, and the control without diffusion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastedit.methods.meg.config import GeneratorConfig
from fastedit.methods.meg.diffusion import Schedule
from fastedit.methods.meg.familiarity import FamiliarityNet
from fastedit.methods.meg.generator import (
    DiT,
    DiTShape,
    Generator,
    Scale,
    Training,
    make_net,
    start_noise,
    train_epoch,
    with_zeros,
)

CONFIG = GeneratorConfig(patch=16, width=48, blocks=2, heads=4, epochs=400, batch_size=8, lr=3e-3, noise=0.05)


def n_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_published_sizes() -> None:
    with torch.device("meta"):
        for size in (5121, 8193, 8192):
            assert n_parameters(DiT(DiTShape(size, 768, 100, 768, 12, 12, published=True))) == 130_845_028
        assert n_parameters(FamiliarityNet(768, 3072, 5, 10, 0.1)) == 23_619_850


def pairs(n: int = 8, size: int = 70, width: int = 24) -> tuple[Tensor, Tensor]:
    """Unit vectors, and neurons that have most in common, as fitted ones have."""
    random = torch.Generator().manual_seed(6)
    vectors = nn.functional.normalize(torch.randn(n, width, generator=random), dim=1)
    start = torch.randn(size, generator=random)
    return vectors, start + 0.3 * torch.randn(n, size, generator=random)


def trained(config: GeneratorConfig, vectors: Tensor, flat: Tensor, epochs: int) -> tuple[Training, Generator]:
    torch.manual_seed(0)
    scale = Scale.of(flat)
    run = Training.start(make_net(config, vectors.shape[1], flat.shape[1]), config, seed=0)
    for _ in range(epochs):
        train_epoch(run, vectors, scale.shrink(flat), config)
    return run, Generator(run.average, scale, start_noise(flat.shape[1], 0), config.sampler_steps)


@pytest.mark.parametrize(("kind", "predicts"), [("dit", "velocity"), ("dit", "clean"), ("mlp", "clean")])
def test_eight_pairs_are_learned_by_heart(kind: str, predicts: str) -> None:
    changes = {"epochs": 125, "batch_size": 128, "width": 64, "blocks": 1, "lr": 5e-3, "ema": 0.99, "noise": 0.0}
    config = CONFIG.model_copy(update={"kind": kind, "predicts": predicts, **changes})
    vectors, flat = pairs()
    run, generator = trained(config, vectors, flat, config.epochs)
    drawn = generator(vectors)
    delta = (flat - flat.mean(0)).norm(dim=1)
    assert ((drawn - flat).norm(dim=1) < 0.05 * delta).all()
    assert torch.cdist(drawn, flat).argmin(1).tolist() == list(range(8))
    assert run.losses[-1] < 0.2 * run.losses[0]
    # The same vector gives the same neuron, whatever else is asked.
    assert torch.equal(generator(vectors), drawn)
    torch.testing.assert_close(generator(vectors[3:4]), drawn[3:4], rtol=1e-4, atol=1e-4)
    # What the vector says is used: another vector gives another neuron.
    assert torch.cdist(generator(vectors.flip(0)), flat).argmin(1).tolist() == list(range(8))[::-1]


def test_going_on_is_bit_for_bit(tmp_path: Any) -> None:
    vectors, flat = pairs()
    scale = Scale.of(flat)
    config = CONFIG.model_copy(update={"dropout": 0.1})

    def fresh() -> Training:
        torch.manual_seed(0)
        return Training.start(make_net(config, 24, 70), config, seed=0)

    whole = fresh()
    for _ in range(6):
        train_epoch(whole, vectors, scale.shrink(flat), config)
    part = fresh()
    for _ in range(3):
        train_epoch(part, vectors, scale.shrink(flat), config)
    torch.save(part.state(), tmp_path / "part")
    torch.manual_seed(99)
    again = Training.start(make_net(config, 24, 70), config, seed=1)
    again.load(torch.load(tmp_path / "part", weights_only=True))
    for _ in range(3):
        train_epoch(again, vectors, scale.shrink(flat), config)
    assert again.losses == whole.losses
    for left, right in zip(again.average.parameters(), whole.average.parameters(), strict=True):
        assert torch.equal(left, right)


def test_modulation_starts_at_zero_and_averages_follow() -> None:
    vectors, flat = pairs()
    x, steps = torch.randn(2, 70), torch.tensor([5, 900])
    published = CONFIG.model_copy(update={"predicts": "velocity"})
    assert torch.equal(make_net(published, 24, 70)(x, steps, vectors[:2]), torch.zeros(2, 70))
    run = Training.start(make_net(CONFIG, 24, 70), CONFIG, seed=0)
    # A clean neuron of zeros.
    torch.testing.assert_close(Schedule().clean(x, run.net(x, steps, vectors[:2]), steps), torch.zeros(2, 70))
    train_epoch(run, vectors, Scale.of(flat).shrink(flat), CONFIG)
    fast, slow = (list(net.parameters())[-1] for net in (run.net, run.average))
    assert 0 < float(slow.detach().norm()) < float(fast.detach().norm()) * 1.01
    assert not torch.equal(fast, slow)


def test_standardised_neurons_come_back() -> None:
    _, flat = pairs()
    flat[:, 5] = 3.0
    scale = Scale.of(flat)
    small = scale.shrink(flat)
    torch.testing.assert_close(scale.restore(small), flat)
    torch.testing.assert_close(small[:, :5].std(0, correction=0), torch.ones(5))
    # An entry that never differs stays where it is instead of being blown up.
    assert torch.equal(small[:, 5], torch.zeros(8))


def test_unrelated_vectors_get_the_zero_neuron() -> None:
    vectors, flat = pairs()
    unrelated = torch.ones(10, 24)
    more, neurons = with_zeros(vectors, flat, unrelated, 0.5)
    assert torch.equal(more, torch.cat([vectors, unrelated[:4]]))
    assert torch.equal(neurons, torch.cat([flat, torch.zeros(4, 70)]))


def test_making_and_training_a_network_leaves_the_global_generator_as_it_was() -> None:
    config = CONFIG.model_copy(update={"dropout": 0.2})
    before = torch.get_rng_state()
    drawn = torch.randn(8, 24, generator=torch.Generator().manual_seed(2))
    vectors, flat = nn.functional.normalize(drawn, dim=1), torch.ones(8, 70)
    run = Training.start(make_net(config, 24, 70, torch.Generator().manual_seed(1)), config, seed=0)
    train_epoch(run, vectors, flat, config)
    assert torch.equal(torch.get_rng_state(), before)
