"""The key sweep against full forwards, also while the weights change between layers."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from fastedit.methods.closed_form.keys import KeySweep, template_weights
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import EditSet

TEMPLATES = ("{}", "The wind is cold. {}", "Because of it, we go. {}")
LAYERS = (1, 2, 4)


def requests_of(published: ModuleType, edits: EditSet) -> list[Any]:
    return [published.Request(e.prompt, e.subject_span[1], e.subject, e.target_new) for e in edits]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def test_sweep_equals_full_forwards_while_weights_change(
    tiny_model: ModelAdapter, tiny_facts: EditSet, published: ModuleType
) -> None:
    edits = tiny_facts[:9]
    requests = requests_of(published, edits)
    model, tokenizer = tiny_model.model, tiny_model.tokenizer
    generator = torch.Generator().manual_seed(1)
    with tiny_model.packed():
        sweep = KeySweep(tiny_model, edits, TEMPLATES, LAYERS)

    for _ in range(2):
        with tiny_model.packed():
            steps = iter(sweep)
        for layer in LAYERS:
            with tiny_model.packed():
                captured = next(steps)
                keys, mass = sweep.keys(captured)

            assert captured.layer == layer
            full = published.compute_keys(model, tokenizer, requests, TEMPLATES, layer)
            assert relative(keys, full) < 1e-5
            assert relative(mass, full.abs().sum(0)) < 1e-5
            hidden = published.compute_hidden(model, tokenizer, requests, LAYERS[-1])
            assert relative(captured.hidden, hidden) < 1e-5

            weight = tiny_model.down_weight(layer)
            weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=generator)


@torch.no_grad()
def test_mass_counts_active_edits_alone(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    active = torch.tensor([True, False, True, True])
    with tiny_model.packed():
        sweep = KeySweep(tiny_model, tiny_facts[:4], TEMPLATES, (2,))
        captured = next(iter(sweep))
        keys, mass = sweep.keys(captured, active)
    torch.testing.assert_close(mass, keys[active].abs().sum(0))
    assert not torch.allclose(mass, keys.abs().sum(0))


def test_template_weights_are_the_two_group_means() -> None:
    torch.testing.assert_close(template_weights(1), torch.tensor([1.0]))
    torch.testing.assert_close(template_weights(6), torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]))
