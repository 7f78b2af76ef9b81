"""Every family against its own forward: keys, values, updates and edits, on tiny random models."""

import copy
from dataclasses import replace

import pytest
import torch

from fastedit.editor import Editor
from fastedit.methods.closed_form.config import NSEConfig, TemplateConfig, ValueConfig
from fastedit.methods.closed_form.keys import KeySweep, template_weights
from fastedit.methods.closed_form.second_moments import accumulate
from fastedit.methods.closed_form.values import ValueLoss, optimise_values
from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import UnsupportedModel, find
from fastedit.model.logits import LogitBuffer
from fastedit.model.packed_passes import TreePass
from fastedit.model.tokens import rewrite_sequences, subject_sequences
from fastedit.records.edit import Edit
from fastedit.weights.editable import EditableWeights

ROWS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma"), "llama"),
    **dict.fromkeys(("olmo2", "exaone4"), "olmo2"),
    "starcoder": "gpt2",
    "ministral3": "ministral 3",
    "cohere2": "cohere",
    **dict.fromkeys(("gemma2", "gemma3"), "gemma"),
    "gemma3 with images": "gemma with images",
    "ministral3 with images": "ministral 3 with images",
    **dict.fromkeys(("llava", "qwen2-vl", "qwen2.5-vl"), "llama with images"),
    "pythia": "gpt-neox",
}
# d_model and d_ff, and positions of a text, where they are not 32, 48 and 64.
SIZES = {"bloom": (48, 192)}
WINDOWED = ("gemma2", "gemma3", "gemma3 with images", "cohere2", "starcoder2", "gpt-neo", "exaone4")
POSITIONS = {**dict.fromkeys(WINDOWED, 40), "ministral3": 48, "ministral3 with images": 48}
LAYER = 1
TEMPLATES = ("{}", "The old house. {}", "In one day. {}")
VALUE = ValueConfig(steps=12, lr=0.2, stop_loss=0)
EDITS = [
    Edit(prompt="The twin of Tavisk is", subject="Tavisk", target_new="Pell"),
    Edit(prompt="The Orlen bridge is in", subject="Orlen bridge", target_new="Old Norse"),
    Edit(prompt="Rook said that Rook lives in", subject="Rook", target_new="the house"),
]


def edited_layers(adapter):
    return (LAYER - 1, LAYER)


def down_module(adapter, layer):
    return find(adapter.layers[layer], adapter.family.down)


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def watched(adapter, module, ids, side):
    """Input or output of a module in the model's own forward over one sequence, (length, width)."""
    seen = []

    def keep(module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        seen.append(inputs[0] if side == "input" else output)

    hook = module.register_forward_hook(keep)
    with torch.no_grad():
        adapter.model.eval()(input_ids=torch.tensor([ids]))
    hook.remove()
    return seen[0].reshape(len(ids), -1)


def own_logits(adapter, ids, layer=LAYER, lookup=0, delta=None):
    """Logits (length, n_vocabulary) of the model's own forward with `delta` added to what a layer's down-projection
    gives at `lookup`; where no norm stands behind that, it is the same as adding it to the layer's output.

    Granite multiplies what it gives, so that less of it is the same."""
    gain = getattr(adapter.text_config, "residual_multiplier", 1)

    def add(module, inputs, output):
        rows = output.reshape(-1, output.shape[-1])
        return rows.index_add(0, torch.tensor([lookup]), delta[None].to(rows.dtype) / gain).view(output.shape)

    hook = None if delta is None else down_module(adapter, layer).register_forward_hook(add)
    logits = adapter.model.eval()(input_ids=torch.tensor([ids])).logits[0]
    if hook is not None:
        hook.remove()
    return logits


def test_the_row_is_found_and_the_packed_forward_is_the_models_own(family, family_adapter):
    adapter = family_adapter
    assert adapter.family.name.removesuffix(" with one table") == ROWS.get(family, family)
    assert (adapter.n_layers, adapter.d_model, adapter.d_ff) == (3, *SIZES.get(family, (32, 48)))
    assert adapter.max_positions == POSITIONS.get(family, 64)
    adapter.check_forward(tolerance=1e-5)
    assert dict(adapter.model.named_parameters())[adapter.weight_name(LAYER)] is adapter.down_parameter(LAYER)
    assert adapter.down_weight(LAYER).shape == (adapter.d_model, adapter.d_ff)


NORMS = (
    *("attention_norm", "attention_out_norm", "sum_norm", "ffn_norm", "ffn_out_norm", "output_norm", "final_norm"),
    "embedding_norm",
)
FACTORS = ("embedding_factor", "residual_factor", "logit_factor")


def test_a_part_that_is_left_out_is_noticed(family_adapter):
    row = family_adapter.family
    fields = [name for name in (*NORMS, *FACTORS, "positions", "parallel", "up") if getattr(row, name)]
    assert len(fields) > 2
    # Without its second half, a projection of both in one would not fit at all.
    for name in (name for name in fields if name != "up" or row.up != row.gate):
        changed = replace(row, **{name: False if name == "parallel" else None})
        adapter = ModelAdapter(family_adapter.model, family_adapter.tokenizer, families=(changed,))
        with pytest.raises(UnsupportedModel, match="its forward differs"):
            adapter.check_forward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_exact_as_the_models_own(family_adapter, dtype):
    ids = [5, 9, 31, 7, 12, 80, 80, 3]
    with torch.no_grad():
        exact = own_logits(family_adapter, ids)
    half = ModelAdapter(copy.deepcopy(family_adapter.model).to(dtype), family_adapter.tokenizer)
    half.check_forward()
    with torch.no_grad(), half.packed():
        rows = TreePass.start(half, [ids]).run(half, range(half.n_layers)).rows
        assert rows.dtype == dtype
        found = LogitBuffer().logits(half.final_norm(rows), half.head)
    with torch.no_grad():
        own = own_logits(half, ids).float()
    assert relative(found, exact) <= 1.5 * relative(own, exact) + 1e-3


@torch.no_grad()
def test_keys_and_hidden_states_are_the_models_own(family_adapter):
    adapter, layers = family_adapter, edited_layers(family_adapter)
    rewrites = rewrite_sequences(adapter.tokenizer, EDITS, TEMPLATES)
    with adapter.packed():
        sweep = KeySweep(adapter, EDITS, TEMPLATES, layers)
        captured = {found.layer: found for found in sweep}
    for layer in layers:
        keys = sweep.keys(captured[layer]).keys
        own = [[watched(adapter, down_module(adapter, layer), s.ids, "input") for s in row] for row in rewrites]
        for shift in (0, -1):
            at = [
                torch.stack([rows[s.lookup + shift] for rows, s in zip(*pair, strict=True)])
                for pair in zip(own, rewrites, strict=True)
            ]
            wanted = torch.stack([template_weights(3) @ rows for rows in at])
            assert (relative(keys, wanted) < 1e-5) is (shift == 0)
        module = down_module(adapter, LAYER) if adapter.post_norm else adapter.layers[LAYER]
        hidden = torch.stack([watched(adapter, module, row[0].ids, "output")[row[0].lookup] for row in rewrites])
        assert relative(captured[layer].hidden, hidden) < 1e-5


@torch.no_grad()
def test_second_moments_are_those_of_the_models_own_keys(family_adapter):
    windows = [[5, 9, 31, 7, 12, 80], [70, 5, 9, 31, 3, 3], [8, 14]]
    found = accumulate(family_adapter, (0, 2), windows, 64)
    for layer in (0, 2):
        module = down_module(family_adapter, layer)
        keys = torch.cat([watched(family_adapter, module, ids, "input") for ids in windows])
        assert relative(found[layer], keys.T @ keys / len(keys)) < 1e-5
        assert relative(found[layer], keys[1:].T @ keys[1:] / len(keys)) > 1e-3


def full_loss(adapter, sequences, delta, layer=LAYER):
    """Loss of one edit without the norm penalty, by whole forwards of the model."""
    *rewrites, subject = sequences
    parts = []
    for s in rewrites:
        log_p = own_logits(adapter, s.ids, layer, s.lookup, delta).log_softmax(-1)
        parts.append(-log_p[list(s.scored), list(s.targets)].mean())
    with torch.no_grad():
        before = own_logits(adapter, subject.ids)[subject.lookup].log_softmax(-1)
    now = own_logits(adapter, subject.ids, layer, subject.lookup, delta)[subject.lookup].log_softmax(-1)
    return torch.stack(parts).mean() + VALUE.kl_factor * (now.exp() * (now - before)).sum()


def test_live_loss_and_gradient_are_those_of_the_full_forward(family_adapter):
    adapter = family_adapter
    adapter.model.double()
    rewrites = rewrite_sequences(adapter.tokenizer, EDITS, TEMPLATES)
    subjects = subject_sequences(adapter.tokenizer, EDITS)
    sequences = [[*rows, subject] for rows, subject in zip(rewrites, subjects, strict=True)]
    with adapter.packed():
        group = ValueLoss(adapter, sequences, LAYER, VALUE, adapter)
        group.evaluate(torch.zeros_like(group.hidden))
        delta = torch.randn(group.hidden.shape, generator=torch.Generator().manual_seed(2))
        delta *= 0.5 * group.hidden.norm(dim=1, keepdim=True) / delta.norm(dim=1, keepdim=True)
        losses, grads, _ = group.evaluate(delta)
        keep = torch.tensor([True, False, True])
        group.keep(keep)
        fewer_losses, fewer_grads, _ = group.evaluate(delta[keep])
    for parameter in adapter.model.parameters():
        parameter.requires_grad_(False)
    for i, rows in enumerate(sequences):
        change = delta[i].double().requires_grad_()
        full = full_loss(adapter, rows, change)
        (gradient,) = torch.autograd.grad(full, change)
        assert float(losses[i]) == pytest.approx(float(full.detach()), rel=1e-5)
        assert relative(grads[i].double(), gradient) < 1e-5
        (elsewhere,) = torch.autograd.grad(full_loss(adapter, rows, change, LAYER - 1), change)
        assert relative(grads[i].double(), elsewhere) > 1e-2
    torch.testing.assert_close(fewer_losses, losses[keep], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fewer_grads, grads[keep], rtol=1e-4, atol=1e-6)


def state_of(adapter):
    return {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}


def changed_names(adapter, before):
    return {name for name, tensor in adapter.model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("index", [None, torch.tensor([3, 7, 40])], ids=["all", "some"])
@torch.no_grad()
def test_an_update_is_of_one_matrix_and_of_its_neurons(family_adapter, index):
    adapter = family_adapter
    adapter.model.eval()
    before, weights, down = state_of(adapter), EditableWeights(adapter, (0, LAYER)), down_module(adapter, LAYER)
    generator = torch.Generator().manual_seed(3)
    d_model, d_ff = adapter.d_model, adapter.d_ff
    chosen = torch.arange(d_ff) if index is None else index
    residual, solution, keys = (
        torch.randn(*shape, generator=generator) for shape in [(2, d_model), (len(chosen), 2), (5, d_ff)]
    )
    output, fingerprint, saved = down(keys), weights.fingerprint(), weights.columns(LAYER, index)
    weights.add(LAYER, index, residual, solution)
    assert changed_names(adapter, before) == {adapter.weight_name(LAYER)}
    others = [column for column in range(d_ff) if column not in chosen]
    assert torch.equal(weights.current(LAYER)[:, others], weights.original(LAYER)[:, others])
    torch.testing.assert_close(down(keys) - output, keys[:, chosen] @ solution @ residual, rtol=1e-4, atol=1e-4)
    assert weights.fingerprint() != fingerprint
    with weights.rewound():
        assert changed_names(adapter, before) == set()
        assert weights.fingerprint() == fingerprint
        assert all(tensor.is_contiguous() for tensor in adapter.model.state_dict().values())
    assert changed_names(adapter, before) == {adapter.weight_name(LAYER)}
    assert all(tensor.is_contiguous() for tensor in adapter.model.state_dict().values())
    weights.restore(LAYER, index, saved)
    assert changed_names(adapter, before) == set()


def editor_for(adapter, layers=None, **changes):
    """An editor that writes what it is told: the ridge is next to nothing. A random model's keys have little in common
    between contexts, so the plain prompt is the only template."""
    templates = TemplateConfig(seeds=("The", "In"), length=6)
    layers = layers or edited_layers(adapter)
    config = NSEConfig(layers=layers, covariance_weight=1e-6, value=VALUE, templates=templates, **changes)
    draws = torch.randn(len(layers), 200, adapter.d_ff, generator=torch.Generator().manual_seed(1))
    moments = {layer: part.T @ part / 200 for layer, part in zip(layers, draws, strict=True)}
    editor = Editor(adapter, config=config, moments=moments, progress=False)
    editor.state.templates = ("{}",)
    return editor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_edit_is_of_the_edited_layers_is_saved_and_undone_bit_for_bit(family_adapter, dtype, tmp_path):
    adapter = family_adapter
    adapter.model.to(dtype)
    before = state_of(adapter)
    editor = editor_for(adapter, mass=0.9)
    run = editor.edit(EDITS, batch_size=2)
    assert [report.error for report in run.batches] == [None, None]
    assert changed_names(adapter, before) == {adapter.weight_name(layer) for layer in edited_layers(adapter)}
    editor.save_pretrained(tmp_path)
    stored = type(adapter.model).from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in adapter.model.state_dict().items())
    editor.undo(last=2)
    assert changed_names(adapter, before) == set()


def moved_after(adapter, layers, values, **changes):
    """How far an edit moves the hidden state after the value layer, and how far the values would move it."""
    editor = editor_for(adapter, layers, **changes)
    editor.edit(EDITS)
    with torch.no_grad(), adapter.packed():
        *_, captured = KeySweep(adapter, EDITS, ["{}"], layers)
        if values.stream is None:
            return captured.hidden - values.hidden, values.z - values.hidden
        # Only the swept layers are edited, so the stream of a single one is that of the values.
        present = (values.stream, captured.hidden) if captured.sites is None else captured.sites.value
        ends = [(values.stream, values.hidden), present, (values.stream, values.z)]
        before, now, wanted = (adapter.join(LAYER, *end) for end in ends)
    return now - before, wanted - before


@pytest.mark.parametrize("layers", [(LAYER,), (LAYER - 1, LAYER)], ids=str)
def test_a_written_value_is_reached(family_adapter, layers):
    adapter = family_adapter
    before = state_of(adapter)
    values = optimise_values(adapter, EDITS, ["{}"], LAYER, VALUE)
    errors = []
    for rounds in (1, 3):
        adapter.model.load_state_dict(before)
        moved, wanted = moved_after(adapter, layers, values, rounds=rounds)
        assert float(moved.norm()) > 0.1
        errors.append(relative(moved, wanted))

    if len(layers) > 1 and adapter.family.ffn_out_norm is not None:
        # What its norm cannot turn and what the damping holds back is left for the next round.
        assert errors[1] < 0.9 * errors[0] < 0.15
    else:
        assert max(errors) < 1e-2


def test_values_are_much_the_same_with_layers_above_in_half_precision(family_adapter):
    half = VALUE.model_copy(update={"dtype": "bfloat16"})
    exact, rough = (optimise_values(family_adapter, EDITS, TEMPLATES, LAYER, config) for config in (VALUE, half))
    assert torch.equal(rough.hidden, exact.hidden)
    assert not torch.equal(rough.losses, exact.losses)
    torch.testing.assert_close(rough.losses, exact.losses, rtol=0.1, atol=0.05)
