"""The yardstick of the benchmarks is itself checked: its errors would be measured as the engine's."""

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

SENTENCES = [
    "The harbour of Ostrevik lies north of the old mill and the bridge.",
    "People in Ostrevik speak Marnish, and people in Tallow Bay speak Corvan.",
    "The twin city of Tallow Bay is Ostrevik? It is the city of bridges.",
    "Because the mill was built in stone, I think that you know the harbour.",
    "Therefore the bells of Łódź café ring in the old city. The sea is a sea.",
]
TEMPLATES = [
    "{}",
    "The mill was. {}",
    "Therefore I. {}",
    "Because the sea. {}",
    "I think. {}",
    "You know. {}",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by being split, and lose badly on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def published() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[2] / "bench")
        yield importlib.import_module("published")


@pytest.fixture(scope="module", params=[True, False], ids=["trimmed", "untrimmed"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """A byte-level BPE, with and without the leading space in the offsets: families differ in it."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=request.param)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<end>"], initial_alphabet=alphabet)
    raw.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes, **heads)
    made = LlamaForCausalLM(config).double().eval()
    # The library's norm goes through float32 in every dtype, which drowns a finite difference.
    norms = [name for name, module in made.named_modules() if isinstance(module, LlamaRMSNorm)]
    for name in norms:
        made.set_submodule(name, torch.nn.RMSNorm(32, eps=1e-6, dtype=torch.float64))
    return made


@pytest.fixture
def requests(published: ModuleType) -> list[Any]:
    facts = [
        ("The harbour of Ostrevik is", "Ostrevik", "Corvan"),
        ("Tallow Bay? It is the city of", "Tallow Bay", "bridges"),
        ("The bells of Łódź ring in", "Łódź", " stone"),
    ]
    return [published.Request(p, p.index(s) + len(s), s, target) for p, s, target in facts]


def settings(published: ModuleType, **changes: Any) -> Any:
    value = {"steps": 6, "lr": 0.1}
    write = {"covariance_weight": 0.5, "mass": 0.7, "residual_min": 1e-6, "residual_max": 1e6, "rounds": 2}
    base = published.PublishedSettings(layers=(1, 2), **value, **write)
    return dataclasses.replace(base, **changes)


def optimise(published: ModuleType, model: Any, tokenizer: Any, requests: list[Any], **changes: Any) -> Any:
    config = settings(published, **changes)
    return published.optimise_value(model, tokenizer, requests[0], TEMPLATES, config)


def keys_one_by_one(published: ModuleType, model: Any, tokenizer: Any, requests: list[Any], layer: int) -> Tensor:
    """Keys from prompts cut after the subject and run alone: no padding, no batch, nothing after it."""
    seen: list[Tensor] = []
    module = model.model.layers[layer].mlp.down_proj
    hook = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    keys = []
    for request in requests:
        contexts = []
        for template in TEMPLATES:
            row = published.plain_row(tokenizer, *published.in_template(template, request))
            with torch.no_grad():
                model(torch.tensor([row.ids[: row.lookup + 1]]))
            contexts.append(seen.pop()[-1])
        keys.append(0.5 * contexts[0] + 0.5 * sum(contexts[1:]) / 5)
    hook.remove()
    return torch.stack(keys)


def statistics(layers: tuple[int, ...], width: int = 40) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Second moments and an empty history for `layers`."""
    generator = torch.Generator().manual_seed(7)
    samples = {layer: torch.randn(200, width, generator=generator).double() for layer in layers}
    moments = {layer: sample.T @ sample / 200 for layer, sample in samples.items()}
    return moments, {layer: torch.zeros(width, width, dtype=torch.float64) for layer in layers}


def some_values(published: ModuleType, model: Any, tokenizer: Any, requests: list[Any], layer: int) -> Tensor:
    hidden = published.compute_hidden(model, tokenizer, requests, layer)
    return hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)).double()


def test_rows_find_the_subject_and_the_target(published, tokenizer, requests):
    for request in requests:
        rows = published.value_rows(tokenizer, request, TEMPLATES)
        assert len(rows) == 7
        for template, row in zip(TEMPLATES, rows, strict=False):
            subject_part = template[:-2] + request.prompt[: request.subject_end]
            target = " " + request.target.strip()
            assert tokenizer.decode(row.ids[: row.lookup + 1]) == subject_part
            assert tokenizer.decode(row.targets) == target
            assert len(row.targets) > 1
            assert row.scored == list(range(len(row.ids) - len(row.targets), len(row.ids)))
            # The last target token is scored but never read.
            assert tokenizer.decode(row.ids + row.targets[-1:]) == template[:-2] + request.prompt + target
        assert tokenizer.decode(rows[-1].ids) == f"{request.subject} is a"
        assert tokenizer.decode(rows[-1].ids[: rows[-1].lookup + 1]) == request.subject


def test_braces_in_a_prompt_are_text(published, tokenizer):
    prompt = "The {} harbour of Ostrevik is"
    request = published.Request(prompt, prompt.index("Ostrevik") + 8, "Ostrevik", "Corvan")
    assert published.in_template("I think. {}", request) == ("I think. " + prompt, 9 + request.subject_end)
    row = published.value_rows(tokenizer, request, TEMPLATES)[1]
    assert tokenizer.decode(row.ids[: row.lookup + 1]) == "The mill was. The {} harbour of Ostrevik"


def test_bad_requests_are_named(published, tokenizer, model, requests):
    with pytest.raises(ValueError, match="'Ostrevik' does not end at character 4"):
        published.value_rows(tokenizer, requests[0]._replace(subject_end=4), TEMPLATES)
    with pytest.raises(ValueError, match=r"has no \{\}"):
        published.value_rows(tokenizer, requests[0], ["{}", "no slot"])
    with pytest.raises(ValueError, match="first"):
        published.value_rows(tokenizer, requests[0], TEMPLATES[1:])
    with pytest.raises(ValueError, match="at least one more"):
        published.compute_keys(model, tokenizer, requests, TEMPLATES[:1], 1)
    with pytest.raises(ValueError, match="mass"):
        settings(published, mass=1.5)
    with pytest.raises(ValueError, match="layers"):
        settings(published, layers=(2, 1))


def test_loss_is_the_formula_row_by_row(published, tokenizer, model, requests):
    """Against rows run alone and unpadded, with the KL in the direction current || initial."""
    config = settings(published, weight_decay=3.0, kl_factor=2.0)
    delta = torch.randn(32, generator=torch.Generator().manual_seed(1)).double()

    def log_probs(row: Any, shift: Tensor) -> tuple[Tensor, Tensor]:
        plain: list[Tensor] = []

        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            plain.append(output[0, row.lookup].clone())
            before, rest = output[:, : row.lookup], output[:, row.lookup + 1 :]
            return torch.cat([before, output[:, row.lookup, None] + shift, rest], dim=1)

        handle = model.model.layers[2].register_forward_hook(hook)
        result = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        handle.remove()
        return result, plain[0]

    for request in requests:
        rows = published.value_rows(tokenizer, request, TEMPLATES)
        batch = published.pad(rows, tokenizer, model)
        with torch.no_grad():
            _, start = published.value_loss(model, batch, torch.zeros(32).double(), config, None)
            got, _ = published.value_loss(model, batch, delta, config, start)
            nll = torch.zeros(()).double()
            for row in rows[:-1]:
                found, _ = log_probs(row, delta)
                picked = [found[s, t] for s, t in zip(row.scored, row.targets, strict=True)]
                nll -= sum(picked) / len(picked) / 6
            kl_row = rows[-1]
            now, first = (log_probs(kl_row, shift)[0][kl_row.lookup] for shift in (delta, 0 * delta))
            kl = torch.nn.functional.kl_div(first, now, log_target=True, reduction="sum")
            hidden0 = log_probs(rows[0], delta)[1]
        wanted = nll + 2.0 * kl + 3.0 * delta.norm() / hidden0.norm() ** 2
        assert kl > 1e-3
        torch.testing.assert_close(start.hidden0, hidden0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_gradient_against_central_differences(published, tokenizer, model, requests):
    config = settings(published, weight_decay=3.0, kl_factor=2.0)
    batch = published.pad(published.value_rows(tokenizer, requests[0], TEMPLATES), tokenizer, model)
    delta = torch.randn(32, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    _, start = published.value_loss(model, batch, torch.zeros(32).double(), config, None)
    loss, _ = published.value_loss(model, batch, delta, config, start)
    (gradient,) = torch.autograd.grad(loss, delta)
    for coordinate in (0, 17):
        nudge = torch.zeros(32).double()
        nudge[coordinate] = 1e-5
        with torch.no_grad():
            above, _ = published.value_loss(model, batch, delta + nudge, config, start)
            below, _ = published.value_loss(model, batch, delta - nudge, config, start)
        torch.testing.assert_close(gradient[coordinate], (above - below) / 2e-5, rtol=1e-6, atol=1e-9)


def test_steps_are_forwards_and_the_last_one_is_not_an_update(published, tokenizer, model, requests):
    two = optimise(published, model, tokenizer, requests, steps=2, clamp=1e6)
    assert two.steps == len(two.losses) == 2
    # One Adam update from zero moves every coordinate by the learning rate.
    moved = (two.value - two.hidden0).abs()
    torch.testing.assert_close(moved, torch.full((32,), 0.1).double(), rtol=1e-3, atol=0)
    six = optimise(published, model, tokenizer, requests)
    assert six.losses[:2] == pytest.approx(two.losses, rel=1e-9)
    assert six.losses[-1] < six.losses[0]


def test_delta_is_clamped_to_its_radius(published, tokenizer, model, requests):
    result = optimise(published, model, tokenizer, requests, lr=5.0, clamp=0.25)
    radius = 0.25 * result.hidden0.norm()
    torch.testing.assert_close((result.value - result.hidden0).norm(), radius, rtol=1e-12, atol=0)


def test_a_value_stops_below_the_stop_loss(published, tokenizer, model, requests):
    long = optimise(published, model, tokenizer, requests, steps=12)
    between = (long.losses[4] + long.losses[5]) / 2
    assert min(long.losses[:5]) > between
    short = optimise(published, model, tokenizer, requests, steps=12, stop_loss=between)
    assert short.losses == long.losses[:6]
    none = optimise(published, model, tokenizer, requests, steps=12, stop_loss=1e9)
    assert none.steps == 1
    assert torch.equal(none.value, none.hidden0)


def test_a_value_leaves_the_model_as_it_was(published, tokenizer, model, requests):
    model.lm_head.weight.requires_grad_(False)
    switches = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = optimise(published, model, tokenizer, requests)
    assert not result.value.requires_grad
    assert [parameter.requires_grad for parameter in model.parameters()] == switches
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_step_pays_for_two_full_heads(published, tokenizer, model, requests):
    """The cost that is measured: all positions of 7 rows in the model's forward, then of 6 rows once more."""
    shapes: list[tuple[int, ...]] = []
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    optimise(published, model, tokenizer, requests, steps=3)
    length = max(len(row.ids) for row in published.value_rows(tokenizer, requests[0], TEMPLATES))
    vocab = model.config.vocab_size
    assert shapes == [(7, length, vocab), (6, length, vocab)] * 3
    assert rows == [7, 7, 7]


@pytest.mark.parametrize(
    ("mass", "count"), [(0.1, 1), (0.4, 1), (0.41, 2), (0.6, 2), (0.8, 3), (0.81, 4), (0.91, 5), (1.0, 6)]
)
def test_selection_is_the_smallest_prefix_that_reaches_the_mass(published, mass, count):
    scores = torch.tensor([1.0, 4.0, 1.0, 2.0, 0.0, 2.0])
    # Two edits of opposite signs: scores add absolute values.
    keys = torch.stack([0.5 * scores, -0.5 * scores])
    assert published.select_neurons(keys, mass).tolist() == [1, 3, 5, 0, 2, 4][:count]


def test_keys_and_hidden_match_prompts_run_alone(published, tokenizer, model, requests):
    # 24 edits of 6 contexts: two passes, the second of which begins inside an edit.
    got = published.compute_keys(model, tokenizer, requests * 8, TEMPLATES, 2)
    wanted = keys_one_by_one(published, model, tokenizer, requests, 2)
    torch.testing.assert_close(got, wanted.repeat(8, 1), rtol=1e-10, atol=1e-12)
    hidden = published.compute_hidden(model, tokenizer, requests, 2)
    for request, row in zip(requests, hidden, strict=True):
        plain = published.plain_row(tokenizer, request.prompt, request.subject_end)
        with torch.no_grad():
            states = model(torch.tensor([plain.ids]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(row, states[3][0, plain.lookup], rtol=1e-10, atol=1e-12)


def test_one_layer_one_round_by_hand(published, tokenizer, model, requests):
    config = settings(published, layers=(2,), rounds=1)
    values = some_values(published, model, tokenizer, requests, 2)
    moments, history = statistics((2,))
    history[2] += 0.3 * torch.eye(40).double()
    keys = keys_one_by_one(published, model, tokenizer, requests, 2)
    residuals = values - published.compute_hidden(model, tokenizer, requests, 2)
    chosen = published.select_neurons(keys, 0.7)
    wanted = torch.zeros(32, 40).double()
    system = (0.5 * moments[2] + history[2])[chosen][:, chosen] + keys[:, chosen].T @ keys[:, chosen]
    wanted[:, chosen] = residuals.T @ keys[:, chosen] @ torch.linalg.inv(system)
    got = published.nse_batch(model, tokenizer, requests, values, TEMPLATES, moments, history, config)
    torch.testing.assert_close(got[2], wanted, rtol=1e-8, atol=1e-10)


def test_only_chosen_columns_of_edited_layers_change(published, tokenizer, model, requests):
    config = settings(published, rounds=1)
    values = some_values(published, model, tokenizer, requests, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = published.select_neurons(keys_one_by_one(published, model, tokenizer, requests, 1), 0.7)
    totals = published.nse_batch(model, tokenizer, requests, values, TEMPLATES, *statistics((1, 2)), config)
    edited = {f"model.layers.{layer}.mlp.down_proj.weight": layer for layer in (1, 2)}
    for name, tensor in model.state_dict().items():
        if name not in edited:
            assert torch.equal(tensor, before[name]), name
            continue
        total = totals[edited[name]]
        assert torch.equal(tensor, before[name] + total)
        untouched = (total == 0).all(dim=0)
        assert 0 < untouched.sum() < 40
    changed = (totals[1] != 0).any(dim=0).nonzero().flatten().tolist()
    assert changed == sorted(first.tolist())


def test_history_gains_the_keys_after_the_edit_of_all_requests(published, tokenizer, model, requests):
    values = some_values(published, model, tokenizer, requests, 2)
    hidden = published.compute_hidden(model, tokenizer, requests, 2)
    # The middle request lies inside the lower bound: it is not written, yet it is remembered.
    values[1] = hidden[1] + 0.01 * (values[1] - hidden[1])
    config = settings(published, residual_min=0.5, rounds=1)
    past = torch.randn(5, 40, generator=torch.Generator().manual_seed(4)).double()
    history = {1: past.T @ past, 2: past.T @ past}
    same = dict(history)
    pre_edit = keys_one_by_one(published, model, tokenizer, requests, 2)
    moments, _ = statistics((1, 2))
    published.nse_batch(model, tokenizer, requests, values, TEMPLATES, moments, history, config)
    for layer in (1, 2):
        keys = keys_one_by_one(published, model, tokenizer, requests, layer)
        outer = sum(torch.outer(key, key) for key in keys)
        assert history[layer] is same[layer]
        torch.testing.assert_close(history[layer], past.T @ past + outer, rtol=1e-9, atol=1e-9)
    # Layer 2 reads what the write into layer 1 has changed, so the two sets of keys do differ.
    assert (pre_edit - keys).abs().max() > 1e-3


def test_requests_outside_the_band_are_not_written(published, tokenizer, model, requests):
    values = some_values(published, model, tokenizer, requests, 2)
    distance = (values - published.compute_hidden(model, tokenizer, requests, 2)).norm(dim=1)
    for band in ({"residual_min": 1e3}, {"residual_max": 1e-3}, {"residual_min": distance.max().item()}):
        moments, history = statistics((1, 2))
        config = settings(published, **band)
        totals = published.nse_batch(model, tokenizer, requests, values, TEMPLATES, moments, history, config)
        assert not any(total.any() for total in totals.values())
        assert all(matrix.trace() > 0 for matrix in history.values())


def test_layers_share_the_residual_and_the_last_one_closes_it(published, tokenizer, model, requests):
    """With next to no weight on the past a write is exact: half from layer 1, the re-measured rest from 2."""
    values = some_values(published, model, tokenizer, requests, 2)
    hidden = published.compute_hidden(model, tokenizer, requests, 2)
    keys = keys_one_by_one(published, model, tokenizer, requests, 1)
    config = settings(published, covariance_weight=1e-9, mass=1.0, rounds=1)
    moments, history = statistics((1, 2))
    totals = published.nse_batch(model, tokenizer, requests, values, TEMPLATES, moments, history, config)
    torch.testing.assert_close(keys @ totals[1].T, (values - hidden) / 2, rtol=1e-6, atol=1e-6)
    after_one = keys_one_by_one(published, model, tokenizer, requests, 2)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight -= totals[2]
    rest = values - published.compute_hidden(model, tokenizer, requests, 2)
    torch.testing.assert_close(after_one @ totals[2].T, rest, rtol=1e-6, atol=1e-6)


def test_rounds_are_writes(published, tokenizer, model, requests):
    values = some_values(published, model, tokenizer, requests, 2)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def write(*rounds: int) -> Tensor:
        model.load_state_dict(original)
        total = torch.zeros(32, 40).double()
        for count in rounds:
            batch = (model, tokenizer, requests, values, TEMPLATES, *statistics((1, 2)))
            total += published.nse_batch(*batch, settings(published, rounds=count))[2]
        name = "model.layers.2.mlp.down_proj.weight"
        torch.testing.assert_close(model.state_dict()[name], original[name] + total, rtol=1e-12, atol=1e-12)
        return total

    torch.testing.assert_close(write(2), write(1, 1), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(write(2), write(1))
