"""Value optimisation: live rows against full forwards, edits together against edits alone, stop rules, groups."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from fastedit.methods.closed_form.config import ValueConfig
from fastedit.methods.closed_form.values import ValueLoss, Values, group_by_length, optimise_values
from fastedit.model.adapter import ModelAdapter
from fastedit.model.tokens import rewrite_sequences, subject_sequences
from fastedit.records.edit import EditSet

TEMPLATES = ("{}", "The wind is cold. {}", "Because of it, we go. {}")
LAYER = 4
CONFIG = ValueConfig(steps=12, lr=0.1)


def sequences_of(model: ModelAdapter, edits: EditSet) -> list[list[Any]]:
    rewrites = rewrite_sequences(model.tokenizer, edits, TEMPLATES)
    subjects = subject_sequences(model.tokenizer, edits)
    return [[*rows, subject] for rows, subject in zip(rewrites, subjects, strict=True)]


def request_of(published: ModuleType, edit: Any) -> Any:
    return published.Request(edit.prompt, edit.subject_span[1], edit.subject, edit.target_new)


def settings_of(published: ModuleType, config: ValueConfig = CONFIG) -> Any:
    return published.PublishedSettings(
        layers=(2, 3, LAYER),
        steps=config.steps,
        lr=config.lr,
        covariance_weight=100.0,
        mass=1.0,
        residual_min=0.0,
        residual_max=1e9,
        rounds=2,
    )


def test_live_loss_and_gradient_equal_the_full_forward(
    tiny_model: ModelAdapter, tiny_facts: EditSet, published: ModuleType
) -> None:
    edits = tiny_facts[:8]
    with tiny_model.packed():
        loss = ValueLoss(tiny_model, sequences_of(tiny_model, edits), LAYER, CONFIG, tiny_model)
        loss.evaluate(torch.zeros_like(loss.hidden))
        generator = torch.Generator().manual_seed(5)
        delta = torch.randn(loss.hidden.shape, generator=generator)
        delta *= 0.5 * loss.hidden.norm(dim=1, keepdim=True) / delta.norm(dim=1, keepdim=True)
        losses, grads, _ = loss.evaluate(delta)
    settings = settings_of(published)

    for i, edit in enumerate(edits):
        rows = published.value_rows(tiny_model.tokenizer, request_of(published, edit), TEMPLATES)
        batch = published.pad(rows, tiny_model.tokenizer, tiny_model.model)
        with published.frozen(tiny_model.model):
            _, start = published.value_loss(tiny_model.model, batch, torch.zeros_like(delta[i]), settings, None)
            row = delta[i].clone().requires_grad_()
            full, _ = published.value_loss(tiny_model.model, batch, row, settings, start)
            (full_grad,) = torch.autograd.grad(full, row)

        penalty = settings.weight_decay / start.hidden0.norm() ** 2
        torch.testing.assert_close(loss.hidden[i], start.hidden0, rtol=1e-5, atol=1e-5)
        assert float(losses[i] + penalty * delta[i].norm()) == pytest.approx(full.item(), rel=1e-5)
        ours = grads[i] + penalty * delta[i] / delta[i].norm()
        assert float((ours - full_grad).norm() / full_grad.norm()) < 1e-5


def test_values_equal_the_published_ones(tiny_model: ModelAdapter, tiny_facts: EditSet, published: ModuleType) -> None:
    edits = tiny_facts[:6]
    values = optimise_values(tiny_model, edits, TEMPLATES, LAYER, CONFIG)

    for i, edit in enumerate(edits):
        request = request_of(published, edit)
        other = published.optimise_value(
            tiny_model.model, tiny_model.tokenizer, request, TEMPLATES, settings_of(published)
        )
        assert int(values.steps[i]) == other.steps - 1
        moved = other.value - other.hidden0
        assert float((values.z[i] - other.value).norm() / moved.norm()) < 1e-3
        # The published loop's last forward is the one we do not run.
        last = other.losses[-1] if other.losses[-1] < CONFIG.stop_loss else other.losses[-2]
        assert float(values.losses[i]) == pytest.approx(last, rel=1e-3, abs=1e-5)


def test_edits_together_equal_edits_alone(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    edits = tiny_facts[:7]
    together = optimise_values(tiny_model, edits, TEMPLATES, LAYER, CONFIG)
    small_groups = optimise_values(tiny_model, edits, TEMPLATES, LAYER, CONFIG.model_copy(update={"token_budget": 60}))
    for i in range(len(edits)):
        alone = optimise_values(tiny_model, edits[i : i + 1], TEMPLATES, LAYER, CONFIG)
        scale = float((alone.z - alone.hidden).norm())
        assert float((together.z[i] - alone.z[0]).norm()) < 1e-3 * scale
        assert float((small_groups.z[i] - alone.z[0]).norm()) < 1e-3 * scale
        assert float(together.losses[i]) == pytest.approx(float(alone.losses[0]), rel=1e-3, abs=1e-5)
        assert int(together.steps[i]) == int(alone.steps[0])


def test_finished_rows_leave_and_the_others_do_not_notice(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    edits = tiny_facts[:8]
    early = CONFIG.model_copy(update={"stop_loss": 1.0})
    stopped = optimise_values(tiny_model, edits, TEMPLATES, LAYER, early)
    through = optimise_values(tiny_model, edits, TEMPLATES, LAYER, CONFIG.model_copy(update={"stop_loss": 0.0}))
    assert len(set(stopped.steps.tolist())) > 2, "the edits should finish at different steps"
    assert bool((stopped.losses < 1.0).all() | (stopped.steps == CONFIG.steps - 1).all())
    late = stopped.steps == CONFIG.steps - 1
    torch.testing.assert_close(stopped.z[late], through.z[late], rtol=1e-3, atol=1e-3)
    assert bool((stopped.steps <= through.steps).all())


def test_stop_after_top1_needs_that_many_steps_in_a_row(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    edits = tiny_facts[:8]
    base = CONFIG.model_copy(update={"stop_loss": 0.0, "steps": 25})
    steps = [
        optimise_values(
            tiny_model, edits, TEMPLATES, LAYER, base.model_copy(update={"stop_after_top1": patience})
        ).steps
        for patience in (1, 3, None)
    ]
    assert bool((steps[0] < steps[2]).any())
    finished = steps[1] < 24
    assert bool((steps[1][finished] >= steps[0][finished] + 2).all())
    assert bool((steps[2] == 24).all())


def test_delta_stays_inside_the_clamp_radius(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    config = ValueConfig(steps=10, lr=5.0, clamp=0.25)
    values = optimise_values(tiny_model, tiny_facts[:5], TEMPLATES, LAYER, config)
    ratio = (values.z - values.hidden).norm(dim=1) / values.hidden.norm(dim=1)
    assert bool((ratio <= 0.25 + 1e-5).all())
    assert float(ratio.max()) == pytest.approx(0.25, rel=1e-4)


def test_progress_counts_every_edit_once(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    counted: list[int] = []
    early = CONFIG.model_copy(update={"stop_loss": 1.0, "token_budget": 100})
    optimise_values(tiny_model, tiny_facts[:6], TEMPLATES, LAYER, early, counted.append)
    assert sum(counted) == 6


def test_groups_keep_the_budget_and_every_edit(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    sequences = sequences_of(tiny_model, tiny_facts[:40])
    live = [sum(len(s.ids) - s.lookup for s in rows) for rows in sequences]
    groups = group_by_length(sequences, 120)
    assert sorted(i for group in groups for i in group) == list(range(40))
    assert all(sum(live[i] for i in group) <= 120 or len(group) == 1 for group in groups)
    assert len(groups) < 40
    assert group_by_length(sequences, 1) != groups


def test_optimisation_leaves_the_model_as_it_was(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    for parameter in tiny_model.model.parameters():
        parameter.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in tiny_model.model.state_dict().items()}
    optimise_values(tiny_model, tiny_facts[:2], TEMPLATES, LAYER, CONFIG)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in tiny_model.model.parameters())


def test_stored_names_are_those_of_run_directories() -> None:
    values = Values(torch.ones(2, 3), torch.zeros(2, 3), torch.full((2,), 0.5), torch.tensor([4, 5]))
    stored = values.tensors()
    assert list(stored) == ["values", "hidden", "losses", "steps"]
    assert stored["values"] is values.z
    assert Values.from_tensors(dict(reversed(stored.items()))) == values
