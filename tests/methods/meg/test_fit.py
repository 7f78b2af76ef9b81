"""All edits at once against one at a time with autograd through the whole model, and what success means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastedit.methods.meg.config import FitConfig
from fastedit.methods.meg.fit import AnswerLoss, fit_layer, fit_neurons, fit_sequences, shared_start
from fastedit.methods.meg.neuron import NeuronForm, attached
from fastedit.methods.meg.passes import UpperRows
from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import find
from fastedit.model.tokens import TokenSequence
from fastedit.records.edit import EditSet

TINY = FitConfig(layer=4, template="{}", ending="")


def sequences_of(model: ModelAdapter, edits: EditSet, config: FitConfig) -> list[TokenSequence]:
    return fit_sequences(model, [e.prompt for e in edits], [e.target_new for e in edits], config)


def one_at_a_time(
    model: ModelAdapter, form: NeuronForm, sequence: TokenSequence, initial: Tensor, layer: int, config: FitConfig
) -> Tensor:
    """Batch one, the whole model at every step, gradients by autograd: the plain loop."""
    flat = initial.clone().requires_grad_()
    kept: list[Tensor] = []
    decoder = model.layers[layer]
    gate, down = find(decoder, model.family.gate), find(decoder, model.family.down)

    def add(module: object, args: object, output: Tensor) -> Tensor:
        read, bias, write = form.split(flat[None])
        sums = kept.pop() @ read[0] + (0 if bias is None else bias)
        return output + form.activate(sums)[..., None] * write

    handles = [
        gate.register_forward_pre_hook(lambda module, args: kept.append(args[0])),
        down.register_forward_hook(add),
    ]
    try:
        for _ in range(config.steps):
            scores = model.model(input_ids=torch.tensor([sequence.ids])).logits[0, list(sequence.scored)]
            loss = torch.nn.functional.cross_entropy(scores, torch.tensor(sequence.targets))
            (grad,) = torch.autograd.grad(loss, flat)
            rate = (
                config.lr
                if config.optimiser == "descent"
                else config.lr * float(loss.detach()) / max(float(grad.square().sum()), 1e-12)
            )
            flat = (flat - rate * grad).detach().requires_grad_()
    finally:
        for handle in handles:
            handle.remove()
    return flat.detach()


@pytest.mark.parametrize(
    ("kind", "optimiser", "lr"),
    [("tiny_model", "descent", 0.05), ("plain_model", "descent", 0.05), ("tiny_model", "polyak", 0.1)],
)
def test_all_at_once_is_one_at_a_time(
    kind: str, optimiser: str, lr: float, tiny_facts: EditSet, request: pytest.FixtureRequest
) -> None:
    either_model: ModelAdapter = request.getfixturevalue(kind)
    # From the published start Polyak steps are so long that rounding alone parts the ways.
    start = "drawn" if optimiser == "descent" else "mean"
    config = FitConfig(optimiser=optimiser, lr=lr, steps=20, stop_loss=1e-9, start=start, template="{}")
    sequences = sequences_of(either_model, tiny_facts[:16], config)
    assert len({len(s.ids) for s in sequences}) > 3
    form, layer = NeuronForm.of(either_model), either_model.n_layers - 2
    initial = shared_start(either_model, form, sequences, layer, config, seed=42)
    kept = initial.clone()
    fitted = fit_neurons(either_model, sequences, form, initial, layer, config)
    assert torch.equal(initial, kept)
    assert torch.equal(fitted.initial, kept)
    assert bool((fitted.steps == 20).all())
    for flat, sequence in zip(fitted.flat, sequences, strict=True):
        wanted = one_at_a_time(either_model, form, sequence, initial, layer, config)
        moved = float((wanted - initial).abs().max())
        assert moved > 1e-2
        assert (flat - wanted).abs().max() < (1e-4 if optimiser == "descent" else 1e-3 * max(1, moved))


def test_who_shares_a_group_does_not_matter(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    config = TINY
    sequences = sequences_of(tiny_model, tiny_facts[:10], config)
    form = NeuronForm.of(tiny_model)
    initial = shared_start(tiny_model, form, sequences, 4, config, seed=0)
    together = fit_neurons(tiny_model, sequences, form, initial, 4, config)
    alone = fit_neurons(tiny_model, sequences, form, initial, 4, config.model_copy(update={"token_budget": 1}))
    # Rows stop at different steps, so that the group is compacted on its way.
    assert len(set(together.steps.tolist())) > 1
    assert torch.equal(together.steps, alone.steps)
    assert (together.flat - alone.flat).abs().max() < 1e-3 * together.flat.abs().max()


def test_success_under_teacher_forcing_is_success_of_decoding(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    seen = {True: 0, False: 0}
    for steps in (1, 2, 4, 40):
        config = TINY.model_copy(update={"steps": steps})
        sequences = sequences_of(tiny_model, tiny_facts[:30], config)
        form = NeuronForm.of(tiny_model)
        initial = shared_start(tiny_model, form, sequences, 4, config, seed=0)
        fitted = fit_neurons(tiny_model, sequences, form, initial, 4, config)
        for flat, ok, sequence in zip(fitted.flat, fitted.solved.tolist(), sequences, strict=True):
            prompt = torch.tensor([sequence.ids[: sequence.scored[0] + 1]])
            with attached(tiny_model, 4, form, flat[None], torch.tensor([True])):
                n_new = len(sequence.targets)
                made = tiny_model.model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n_new, do_sample=False
                )
            right = tuple(made[0, prompt.shape[1] :].tolist()) == sequence.targets
            assert right == ok
            seen[ok] += 1
    assert sum(seen.values()) == 120
    assert min(seen.values()) >= 20


def test_every_tiny_edit_can_be_fitted(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    config = TINY
    sequences = sequences_of(tiny_model, tiny_facts[:20], config)
    form = NeuronForm.of(tiny_model)
    initial = shared_start(tiny_model, form, sequences, 4, config, seed=0)
    counted: list[int] = []
    fitted = fit_neurons(tiny_model, sequences, form, initial, 4, config, counted.append)
    assert bool(fitted.solved.all())
    assert bool((fitted.losses < config.stop_loss).all())
    assert sum(counted) == 20


def test_half_precision_models_are_fitted_in_float32(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    tiny_model.model.bfloat16()
    config = TINY.model_copy(update={"steps": 10})
    sequences = sequences_of(tiny_model, tiny_facts[:4], config)
    form = NeuronForm.of(tiny_model)
    initial = shared_start(tiny_model, form, sequences, 4, config, seed=0)
    fitted = fit_neurons(tiny_model, sequences, form, initial, 4, config)
    assert fitted.flat.dtype == torch.float32
    # Some numbers of the difference lie below bfloat16's steps.
    assert not torch.equal(fitted.flat, fitted.flat.bfloat16().float())
    assert bool((fitted.losses < 3).all())


def test_what_is_scored(tiny_model: ModelAdapter) -> None:
    tokenizer, end = tiny_model.tokenizer, tiny_model.tokenizer.eos_token_id
    prompts, answers = ["The colour of Vrudi is"], ["pale grey"]
    whole = fit_sequences(tiny_model, prompts, answers, FitConfig())[0]
    text = tokenizer("The colour of Vrudi is\nAnswer: pale grey.")["input_ids"]
    prompt = tokenizer("The colour of Vrudi is\nAnswer:")["input_ids"]
    assert [*whole.ids, whole.targets[-1]] == [*text, end]
    assert list(whole.targets) == [*text[len(prompt) :], end]
    assert whole.scored == tuple(range(len(prompt) - 1, len(text)))
    bare = fit_sequences(tiny_model, prompts, answers, FitConfig(stop_token=False, ending=""))[0]
    assert list(bare.targets) == text[len(prompt) : -1]


def test_layers_and_templates_are_checked(tiny_model: ModelAdapter) -> None:
    assert fit_layer(FitConfig(), 30) == 22
    with pytest.raises(ValueError, match=r"fit.layer must lie in 0-7, got 8"):
        fit_layer(FitConfig(layer=8), 8)
    for template in ("no place", "{} {}", "{}\n"):
        with pytest.raises(ValueError, match="template must hold"):
            FitConfig(template=template)


def test_a_neuron_that_runs_off_is_no_success(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    config = TINY.model_copy(update={"optimiser": "descent", "lr": 1e30, "steps": 3})
    sequences = sequences_of(tiny_model, tiny_facts[:3], config)
    form = NeuronForm.of(tiny_model)
    initial = shared_start(tiny_model, form, sequences, 4, config, seed=0)
    fitted = fit_neurons(tiny_model, sequences, form, initial, 4, config)
    assert not bool(fitted.solved.any())
    assert bool(fitted.flat.isfinite().all())


def test_a_neuron_that_runs_off_leaves_the_others_alone(tiny_model: ModelAdapter, tiny_facts: EditSet) -> None:
    sequences = sequences_of(tiny_model, tiny_facts[:2], TINY)
    form = NeuronForm.of(tiny_model)
    calm = shared_start(tiny_model, form, sequences, 4, TINY, seed=0).repeat(2, 1)
    wild = calm.clone()
    wild[1] *= 1e25
    with tiny_model.packed():
        loss = AnswerLoss(tiny_model, form, UpperRows.start(tiny_model, sequences, 4))
        alone, beside = loss(calm), loss(wild)
    assert not bool(beside.losses[1].isfinite())
    assert torch.equal(beside.losses[0], alone.losses[0])
    assert torch.equal(beside.grad[0], alone.grad[0])
