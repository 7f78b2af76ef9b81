"""LoRA adapters of PEFT: the base weights are edited, and the adapters stay on."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fastedit.editor import Editor
from fastedit.methods.closed_form.config import NSEConfig, TemplateConfig, ValueConfig
from fastedit.methods.closed_form.keys import KeySweep
from fastedit.methods.closed_form.values import optimise_values
from fastedit.methods.columns.config import FiNEConfig, TrainConfig
from fastedit.model import lora
from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import UnsupportedModel, find
from fastedit.model.load import load_model
from fastedit.records.edit import Edit

# Family -> the layers that get an adapter: in front of, on and behind the edited weight.
TARGETS = {
    "llama": ["q_proj", "o_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "olmo2": ["v_proj", "up_proj", "down_proj", "embed_tokens"],
}
VALUE = ValueConfig(steps=12, lr=0.2, stop_loss=0)
EDITS = [
    Edit(prompt="The twin of Tavisk is", subject="Tavisk", target_new="Pell"),
    Edit(prompt="The Orlen bridge is in", subject="Orlen bridge", target_new="Old Norse"),
]


def with_adapter(model, targets, names=("default",), **options):
    """PEFT's wrapper around a copy of the model, with adapters that change something."""
    config = LoraConfig(target_modules=targets, r=4, lora_alpha=6, lora_dropout=0.3, task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(copy.deepcopy(model), config, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(4)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15)
    return adapted


@pytest.fixture(params=TARGETS)
def kind(request):
    return request.param


@pytest.fixture
def adapted(kind, family_models):
    return with_adapter(family_models[kind], TARGETS[kind])


@pytest.fixture
def adapter(adapted, random_tokenizer):
    return ModelAdapter(adapted, random_tokenizer)


def layers_of(adapter):
    return (1,) if adapter.post_norm else (0, 1)


def editor_for(model, tokenizer, layers, **value):
    """An editor that writes what it is told: the ridge is next to nothing."""
    templates = TemplateConfig(seeds=("The", "In"), length=6)
    config = NSEConfig(
        layers=layers, covariance_weight=1e-6, value=VALUE.model_copy(update=value), templates=templates, rounds=1
    )
    draws = torch.randn(len(layers), 200, 48, generator=torch.Generator().manual_seed(1))
    moments = {layer: part.T @ part / 200 for layer, part in zip(layers, draws, strict=True)}
    editor = Editor.from_model(model, tokenizer, config=config, moments=moments, progress=False)
    editor.state.templates = ("{}",)
    return editor


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed_names(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_packed_passes_are_those_of_the_adapted_model(adapter, adapted, kind, family_models):
    adapter.check_forward(1e-5)
    ids = torch.tensor([[5, 9, 31, 7]])
    with torch.no_grad():
        ours, bare = adapted.eval()(input_ids=ids).logits, family_models[kind].eval()(input_ids=ids).logits
    assert float((ours - bare).norm() / bare.norm()) > 0.05
    assert adapter.given is adapted
    assert adapter.family.name == {"olmo2": "olmo2"}.get(kind, kind)
    assert set(adapter.state()) == set(family_models[kind].state_dict())
    assert adapter.parameters()[adapter.weight_name(1)] is adapter.down_parameter(1)


@torch.no_grad()
def test_the_weight_with_what_adapters_add_is_what_keys_are_multiplied_with(adapter):
    keys = torch.randn(5, adapter.d_ff, generator=torch.Generator().manual_seed(1))
    adapter.model.eval()
    without_bias = adapter.down(1, keys) - adapter.down(1, torch.zeros_like(keys))
    torch.testing.assert_close(without_bias, keys @ adapter.output_weight(1).T, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapter.output_weight(1), adapter.down_weight(1), atol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_edit_is_of_the_base_weights_is_reached_and_undone_bit_for_bit(adapted, random_tokenizer, dtype):
    adapter = ModelAdapter(adapted, random_tokenizer)
    layers, before = layers_of(adapter), state_of(adapted)
    editor = editor_for(adapted, random_tokenizer, layers, dtype=dtype)
    adapter = editor.adapter
    assert editor.model is adapted

    wanted = optimise_values(adapter, EDITS, ["{}"], layers[-1], editor.config.value, upper=editor.state.upper)
    editor.edit(EDITS)
    with torch.no_grad(), adapter.packed():
        *_, captured = KeySweep(adapter, EDITS, ["{}"], layers)
    moved = captured.hidden - wanted.hidden
    assert float((moved - (wanted.z - wanted.hidden)).norm() / moved.norm()) < 1e-2

    down = {find(adapter.layers[layer], adapter.family.down) for layer in layers}
    written = {f"{path}.base_layer.weight" for path, part in adapted.named_modules() if part in down}
    assert changed_names(adapted, before) == written
    editor.undo()
    assert changed_names(adapted, before) == set()


def test_the_columns_of_fine_are_written_too(adapter, adapted):
    before = state_of(adapted)
    editor = Editor(adapter, "fine", FiNEConfig(frozen_layers=1, train=TrainConfig(steps=3)), progress=False)
    editor.edit(EDITS[:1])
    changed = changed_names(adapted, before)
    assert changed
    assert all(name.endswith(".base_layer.weight") for name in changed)
    editor.undo()
    assert changed_names(adapted, before) == set()


def test_base_and_adapters_are_saved_and_make_the_same_model(adapted, random_tokenizer, tmp_path):
    editor = editor_for(adapted, random_tokenizer, layers_of(ModelAdapter(adapted, random_tokenizer)))
    editor.edit(EDITS)
    saved = editor.save_pretrained(tmp_path)
    assert "adapters are in adapter/ beside them" in str(saved)

    base = load_model(tmp_path)
    for name, tensor in editor.adapter.state().items():
        assert torch.equal(base.model.state_dict()[name], tensor)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 9, 31, 7]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)


def test_a_run_goes_on_with_the_model_handed_over(adapted, random_tokenizer, tmp_path):
    fresh = copy.deepcopy(adapted)
    editor = editor_for(adapted, random_tokenizer, layers_of(ModelAdapter(adapted, random_tokenizer)))
    editor.edit(EDITS, run_dir=tmp_path / "run")
    moments = editor.state.moments
    again = Editor.resume(tmp_path / "run", ModelAdapter(fresh, random_tokenizer), moments=moments, progress=False)
    assert again.weights.fingerprint() == editor.weights.fingerprint()
    exported = editor.export(tmp_path / "delta", "delta")
    assert exported.holds.as_saved == exported.holds.in_model


@torch.no_grad()
def test_adapters_that_are_off_or_several_count_as_the_model_counts_them(family_models, random_tokenizer):
    adapted = with_adapter(family_models["llama"], TARGETS["llama"], names=("one", "two")).eval()
    adapter, keys, seen = ModelAdapter(adapted, random_tokenizer), torch.ones(1, 48), []
    for names in (["one"], ["two"], ["one", "two"]):
        adapted.base_model.set_adapter(names)
        adapter.check_forward(1e-5)
        seen.append((adapter.output_weight(1).clone(), adapter.weights_hash(1)))
        torch.testing.assert_close(adapter.down(1, keys), keys @ adapter.output_weight(1).T)
    with adapted.disable_adapter():
        adapter.check_forward(1e-5)
        assert torch.equal(adapter.output_weight(1), adapter.down_weight(1))
        seen.append((adapter.output_weight(1), adapter.weights_hash(1)))
    base = adapter.down_weight(1)
    torch.testing.assert_close(seen[2][0] - base, seen[0][0] + seen[1][0] - 2 * base)
    # Second moments are kept under this hash.
    assert len({digest for _, digest in seen}) == 4


def test_what_cannot_stay_on_is_refused_with_what_to_do(family_models, random_tokenizer):
    model = family_models["llama"]
    merged = with_adapter(model, ["down_proj"])
    merged.merge_adapter()
    cases = {
        r"its adapter is merged into model.layers.0.mlp.down_proj: unmerge_adapter\(\)": merged,
        r"the adapter in model.layers.0.mlp.down_proj changes more than what it adds \(DoRA": with_adapter(
            model, ["down_proj"], use_dora=True
        ),
        "has an adapter on its head": with_adapter(model, ["lm_head"]),
        "has an adapter of kind IA3": get_peft_model(
            copy.deepcopy(model),
            peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
        ),
        "has an adapter of kind PROMPT_TUNING": get_peft_model(
            copy.deepcopy(model), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        ),
    }
    for told, adapted in cases.items():
        with pytest.raises(UnsupportedModel, match=told) as caught:
            ModelAdapter(adapted, random_tokenizer)
        assert "\n" not in str(caught.value)
    merged.unmerge_adapter()
    ModelAdapter(merged, random_tokenizer).check_forward()


def test_a_quantised_base_is_refused(family_models, random_tokenizer):
    adapted = with_adapter(family_models["llama"], ["down_proj"])
    base = adapted.get_base_model().model.layers[1].mlp.down_proj.base_layer
    del base.weight
    base.register_buffer("weight", torch.zeros(32, 48, dtype=torch.int8))
    with pytest.raises(UnsupportedModel, match=r"layer 1: mlp.down_proj is quantised \(torch.int8\)"):
        ModelAdapter(adapted, random_tokenizer)


def test_names_of_parameters_without_adapters():
    assert lora.stored_name("model.layers.0.mlp.down_proj.base_layer.weight") == "model.layers.0.mlp.down_proj.weight"
    assert lora.stored_name("model.layers.0.mlp.down_proj.lora_A.default.weight") is None
    assert lora.stored_name("model.embed_tokens.lora_embedding_A.default") is None
    assert lora.stored_name("model.norm.weight") == "model.norm.weight"
