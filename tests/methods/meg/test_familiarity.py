"""Entropy, the strict threshold, memorising edits, and the choice of the threshold on a development slice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastedit.methods.meg.config import FamiliarityConfig
from fastedit.methods.meg.familiarity import (
    Dropout,
    choose_threshold,
    draw_masks_from,
    entropy,
    is_familiar,
    linear,
    train_familiarity,
)

CONFIG = FamiliarityConfig(blocks=2, epochs=200, batch_size=16, noise=0.3)


def unit(n: int, seed: int, width: int = 32) -> Tensor:
    return normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_entropy_of_the_extremes() -> None:
    entropies = entropy(torch.stack([torch.zeros(10), torch.eye(10)[3] * 200]))
    assert float(entropies[0]) == pytest.approx(math.log(10))
    # Nine probabilities clamped at 1e-8.
    assert float(entropies[1]) == pytest.approx(9 * 1e-8 * -math.log(1e-8), abs=1e-7)


def test_the_bound_is_strict() -> None:
    assert is_familiar(torch.tensor([0.29, 0.3, 0.31], dtype=torch.float64), 0.3).tolist() == [True, False, False]


def test_edits_are_known_and_others_are_not() -> None:
    edits, others = unit(40, 1), unit(200, 2)
    gate = train_familiarity(edits, CONFIG, seed=0, background=others[:150])
    near = normalize(edits + 0.02 * torch.randn(edits.shape, generator=torch.Generator().manual_seed(3)), dim=1)
    assert float((gate(edits) < 0.6).float().mean()) >= 0.97
    assert float((gate(near) < 0.6).float().mean()) > 0.9
    blind = train_familiarity(edits, CONFIG, seed=0)
    inside = [float((judge(others[150:]) < 0.6).float().mean()) for judge in (gate, blind)]
    assert inside[0] < 0.5 * inside[1]


def test_without_other_prompts_the_gate_still_learns_its_edits() -> None:
    edits = unit(40, 1)
    epochs: list[int] = []
    gate = train_familiarity(edits, CONFIG, seed=0, progress=epochs.append)
    assert float((gate(edits) < 0.15).float().mean()) >= 0.97
    # It stopped by what it does, not at the last epoch.
    assert len(epochs) < CONFIG.epochs
    again = train_familiarity(edits, CONFIG, seed=0)
    assert torch.equal(again(edits), gate(edits))
    assert not torch.equal(train_familiarity(edits, CONFIG, seed=1)(edits), gate(edits))


def test_threshold_takes_the_best_harmonic_mean() -> None:
    own = torch.tensor([0.0, 0.0, 0.1, 0.1])
    reworded = torch.tensor([0.2, 0.3, 0.4, 1.5])
    unrelated = torch.tensor([0.35, 1.0, 1.2, 1.4])
    bound = choose_threshold(own, reworded, unrelated)
    # Up to 0.4: all own, three of four reworded, three of four unrelated kept out.
    assert 0.4 < bound < 1.0
    assert choose_threshold(own, own + 0.01, unrelated) < 0.35


def test_training_draws_from_a_generator_of_its_own() -> None:
    """As with torch's global generator seeded alike, which is left as it was and may be drawn from meanwhile."""
    config = CONFIG.model_copy(update={"epochs": 3, "dropout": 0.2})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    alone = train_familiarity(unit(20, 0), config, 7, unit(10, 1))
    assert torch.equal(torch.get_rng_state(), before)

    disturbed = train_familiarity(unit(20, 0), config, 7, unit(10, 1), lambda _: torch.manual_seed(3) and None)
    for name, weight in alone.net.state_dict().items():
        assert torch.equal(weight, disturbed.net.state_dict()[name])


def test_layers_and_masks_are_those_that_torch_draws() -> None:
    random = torch.Generator().manual_seed(4)
    ours, dropped = linear(7, 5, random), Dropout(0.3)
    draw_masks_from(dropped, random)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        theirs = torch.nn.Linear(7, 5)
        wanted = torch.nn.Dropout(0.3)(x)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)
    assert torch.equal(dropped(x), wanted)
    assert torch.equal(dropped.eval()(x), x)
