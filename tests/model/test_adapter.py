"""Which models are taken and which refused, and models spread over devices."""

import copy
from dataclasses import replace

import accelerate
import pytest
import torch
import transformers
from accelerate import dispatch_model
from torch._subclasses.fake_tensor import FakeTensorMode

from fastedit.editor import Editor
from fastedit.methods.closed_form.config import NSEConfig, TemplateConfig, ValueConfig
from fastedit.methods.closed_form.keys import KeySweep
from fastedit.methods.closed_form.second_moments import accumulate
from fastedit.methods.closed_form.values import ValueLoss
from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import FAMILIES, LLAMA, UnsupportedModel, find
from fastedit.model.load import ModelNotFound, load_model
from fastedit.model.tokens import rewrite_sequences, subject_sequences
from fastedit.records.edit import Edit
from fastedit.weights.editable import EditableWeights

LAYER = 1
VALUE = ValueConfig(steps=3, lr=0.1)
ONE_PER_ROW = (
    *("llama", "phi3", "gemma2", "gemma3", "gemma3 with images", "gpt2", "gptj"),
    *(
        "pythia",
        "gpt-neox in sequence",
        "opt",
        "opt-350m",
        "granite",
        "cohere",
        "stablelm",
        "starcoder2",
        "phi",
        "glm4",
    ),
    *("olmo2", "gpt-neo", "codegen", "falcon", "falcon with two norms", "falcon with alibi", "bloom", "ministral3"),
)
EDITS = [
    Edit(prompt="The twin of Tavisk is", subject="Tavisk", target_new="Pell"),
    Edit(prompt="The Orlen bridge is in", subject="Orlen bridge", target_new="Old Norse"),
]


def test_a_misfit_names_what_is_missing_and_what_is_too_much(random_llama, random_tokenizer):
    assert LLAMA.misfits(random_llama) == []
    random_llama.model.layers[0].extra = torch.nn.Identity()
    assert LLAMA.misfits(random_llama) == ["layer 0 has extra"]
    del random_llama.model.layers[0].mlp.up_proj, random_llama.model.norm
    assert LLAMA.misfits(random_llama) == ["has no model.norm", "layer 0 has extra", "layer 0 has no mlp.up_proj"]
    for layer in random_llama.model.layers[1:]:
        layer.extra = torch.nn.Identity()
    assert "a layer has extra" in LLAMA.misfits(random_llama)
    wanted = replace(LLAMA, config=(("hidden_act", "relu"),))
    assert wanted.misfits(random_llama)[-1] == "its config has hidden_act='silu', not 'relu'"
    assert "model.layers is no list of layers" in LLAMA.misfits(torch.nn.Linear(2, 2))


def test_every_layer_is_matched(random_llama, random_tokenizer):
    random_llama.model.layers[2].post_norm = torch.nn.Identity()
    with pytest.raises(UnsupportedModel, match="'llama' comes closest, but layer 2 has post_norm"):
        ModelAdapter(random_llama, random_tokenizer)


def test_dense_and_expert_layers_are_told_apart(random_llama, random_tokenizer):
    """DeepSeek's way: the first layers are dense, the others mixtures of experts."""
    for layer in random_llama.model.layers[1:]:
        dense = layer.mlp
        layer.mlp = torch.nn.Module()
        layer.mlp.experts = torch.nn.ModuleList([dense])
    with pytest.raises(UnsupportedModel) as caught:
        ModelAdapter(random_llama, random_tokenizer)
    assert "each of layers 1, 2, 3 has a mixture of experts in mlp, no dense feed-forward" in str(caught.value)
    assert "quantised" not in str(caught.value)


def test_a_config_without_a_number_of_positions_is_refused(random_llama, random_tokenizer):
    vars(random_llama.config)["max_position_embeddings"] = None
    with pytest.raises(UnsupportedModel, match="no max_position_embeddings"):
        ModelAdapter(random_llama, random_tokenizer)


@pytest.mark.parametrize("kind", ["Doge", "Falcon", "GraniteSWA"])
def test_a_model_whose_parts_work_otherwise_is_unsupported(kind, random_tokenizer):
    """No traceback of transformers gets out, whatever a class of the same structure wants."""
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip("this transformers does not have it")
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    gated = {**sizes, "intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.2}
    own = {"Doge": gated, "Falcon": {**sizes, "alibi": True}, "GraniteSWA": {**gated, "residual_multiplier": 0.3}}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**own[kind]))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_()
    with pytest.raises(UnsupportedModel, match=type(model).__name__):
        ModelAdapter(model, random_tokenizer).check_forward()


class NewAttention(torch.nn.Module):
    """An attention that raises."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, *inputs, **options):
        raise self.error


def test_an_exception_of_the_packed_forward_is_unsupported_with_its_cause(random_adapter):
    cause = TypeError("forward() missing 1 required positional argument: 'position_ids'\nand more")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelAdapter, "mix", NewAttention(cause).forward)
        with pytest.raises(UnsupportedModel) as caught:
            random_adapter.check_forward()
    assert caught.value.__cause__ is cause
    assert "looks like family 'llama', but cannot be run as that (TypeError: forward() missing" in str(caught.value)
    assert "\n" not in str(caught.value)
    random_adapter.check_forward()


def test_an_exception_of_the_models_own_forward_is_unsupported_too(random_adapter):
    random_adapter.model.model.layers[1].self_attn = NewAttention(KeyError("cache"))
    with pytest.raises(UnsupportedModel, match=r"its own forward fails \(KeyError: 'cache'\)"):
        random_adapter.check_forward()


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lack_of_memory_and_an_interrupt_stay_what_they_are(random_adapter, monkeypatch, error):
    monkeypatch.setattr(ModelAdapter, "mix", NewAttention(error).forward)
    with pytest.raises(type(error)) as caught:
        random_adapter.check_forward()
    assert caught.value is error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(random_adapter, value):
    random_adapter.model.model.layers[3].mlp.up_proj.weight.data[0, :5] = value
    with pytest.raises(UnsupportedModel) as caught:
        random_adapter.check_forward()
    assert "model.layers.3.mlp.up_proj.weight holds 5 numbers that are not finite" in str(caught.value)
    assert "family" not in str(caught.value)


def test_an_overflow_of_a_dtype_suggests_another(random_llama, random_tokenizer):
    model = random_llama.half()
    model.model.layers[1].mlp.down_proj.weight.data.fill_(6e4)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(6e4)
    with pytest.raises(UnsupportedModel) as caught:
        ModelAdapter(model, random_tokenizer).check_forward()
    message = str(caught.value)
    assert "in float16 its logits are not, first in model.layers.1.mlp" in message
    assert "load it in bfloat16 or float32" in message


def test_a_model_whose_logits_are_all_zero_is_taken(random_adapter):
    random_adapter.model.lm_head.weight.data.zero_()
    random_adapter.check_forward()


def test_a_row_of_ones_own_makes_an_unknown_family_known(random_llama, random_tokenizer):
    """The same model under other names, with its norm as a part that no shipped row expects."""
    random_llama.model.blocks = random_llama.model.layers
    del random_llama.model.layers
    with pytest.raises(UnsupportedModel, match=r"'llama' comes closest, but has no model\.layers"):
        ModelAdapter(random_llama, random_tokenizer)
    row = replace(LLAMA, name="mine", layers="model.blocks")
    adapter = ModelAdapter(random_llama, random_tokenizer, families=(row, *FAMILIES))
    assert adapter.family.name == "mine"
    assert adapter.weight_name(0) == "model.blocks.0.mlp.down_proj.weight"


def test_an_editor_takes_rows_of_ones_own(random_llama, random_tokenizer, tmp_path):
    random_llama.save_pretrained(tmp_path)
    random_tokenizer.save_pretrained(tmp_path)
    config = NSEConfig(layers=(1, 2), covariance_weight=1)
    options = {"families": (replace(LLAMA, name="mine"),), "config": config, "progress": False}
    assert Editor.from_model(random_llama, random_tokenizer, **options).adapter.family.name == "mine"
    assert Editor.from_pretrained(str(tmp_path), **options).adapter.family.name == "mine"


@pytest.mark.parametrize("settings", [{"quant_method": "bitsandbytes"}, {"bits": 4}])
def test_a_quantised_model_is_refused(random_llama, random_tokenizer, settings):
    random_llama.config.quantization_config = settings
    with pytest.raises(UnsupportedModel, match=r"is quantised .*load the model in bfloat16 or float32"):
        ModelAdapter(random_llama, random_tokenizer)
    random_llama.config.quantization_config = {"quant_method": "gguf"}
    assert ModelAdapter(random_llama, random_tokenizer).n_layers == 4


def test_a_quantised_folder_is_refused_before_its_weights_are_read(random_llama, random_tokenizer, tmp_path):
    random_tokenizer.save_pretrained(tmp_path)
    random_llama.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    random_llama.config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"is quantised \(gptq\)"):
        load_model(str(tmp_path))
    del random_llama.config.quantization_config
    random_llama.config.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match="cannot load"):
        load_model(str(tmp_path))


def test_a_capped_model_is_loaded_with_the_attention_that_caps(family_models, random_tokenizer, tmp_path):
    for name, attention in (("gemma2", "eager"), ("llama", "sdpa")):
        family_models[name].save_pretrained(tmp_path / name)
        random_tokenizer.save_pretrained(tmp_path / name)
        assert load_model(str(tmp_path / name)).model.config._attn_implementation == attention


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(32, 48, dtype=torch.int8), torch.zeros(768, 1, dtype=torch.uint8), None],
    ids=["8 bits", "4 bits", "gone"],
)
def test_a_quantised_weight_is_refused(random_llama, random_tokenizer, weight):
    down = random_llama.model.layers[2].mlp.down_proj
    del down.weight
    if weight is not None:
        down.register_buffer("weight", weight)
    with pytest.raises(UnsupportedModel, match=r"layer 2: mlp.down_proj is quantised \((torch.u?int8|no weight)\)"):
        ModelAdapter(random_llama, random_tokenizer)


def test_offloaded_weights_are_refused(random_llama, random_tokenizer):
    random_llama.model.layers[3].to("meta")
    with pytest.raises(UnsupportedModel, match=r"9 weights are offloaded, model.layers.3.* device_map"):
        ModelAdapter(random_llama, random_tokenizer)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_that_accelerate_offloaded_is_refused(place, random_llama, random_tokenizer, tmp_path):
    here = torch.device("cpu")
    if place == "cpu":
        accelerate.cpu_offload(random_llama, execution_device=here)
    else:
        accelerate.disk_offload(random_llama, tmp_path, execution_device=here)
    with pytest.raises(UnsupportedModel, match=r"weights are offloaded, model.embed_tokens.weight.* whole on the CPU"):
        Editor.from_model(random_llama, random_tokenizer)


def test_texts_of_a_model_without_a_bound_end_where_those_of_its_training_did(family_models, random_tokenizer):
    config = copy.deepcopy(family_models["bloom"].config)
    for number, wanted in ((None, 2048), (128, 128)):
        config.max_position_embeddings, config.seq_length = None, number
        model = type(family_models["bloom"])(config)
        assert ModelAdapter(model, random_tokenizer).max_positions == wanted


@pytest.mark.parametrize("value", [0, None, "2"])
def test_a_factor_that_is_none_is_refused(family_models, random_tokenizer, value):
    model = copy.deepcopy(family_models["granite"])
    vars(model.config)["logits_scaling"] = value
    with pytest.raises(UnsupportedModel, match=f"logits_scaling is {value!r}, and a number other than 0 is needed"):
        ModelAdapter(model, random_tokenizer)


def test_texts_end_where_a_longrope_would_turn_otherwise(family_models, random_tokenizer):
    config = copy.deepcopy(family_models["phi3"].config)
    # transformers 4 calls them otherwise.
    name = "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling"
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 24,
        "short_factor": [1.0] * 4,
        "long_factor": [9.0] * 4,
    }
    setattr(config, name, longrope)
    config.original_max_position_embeddings = 24
    model = type(family_models["phi3"])(config).eval()
    adapter = ModelAdapter(model, random_tokenizer)
    adapter.check_forward(1e-5)
    assert adapter.max_positions == 24
    with torch.no_grad():
        short, long = (model(input_ids=torch.arange(count)[None]).logits[0, :24] for count in (24, 25))
    assert float((short - long).abs().max()) > 1e-3


def test_text_is_generated_without_dropout_and_every_mode_comes_back(family_adapter):
    model = family_adapter.model.train()
    model.get_output_embeddings().eval()
    modes = {name: part.training for name, part in model.named_modules()}
    ids = torch.tensor([[5, 9, 31], [7, 12, 80]])
    found = family_adapter.generate(ids, 6, top_k=1)
    assert {name: part.training for name, part in model.named_modules()} == modes
    wanted = ids
    with torch.no_grad():
        for _ in range(6):
            logits = model.eval()(input_ids=wanted).logits[:, -1]
            logits[:, 2] = -torch.inf
            wanted = torch.cat([wanted, logits.argmax(1, keepdim=True)], 1)
    assert torch.equal(found, wanted)


def device_map(adapter):
    """Every part of a model on "cpu" by name, layers one by one."""
    names = [name for name, _ in adapter.model.named_modules() if name]
    layers = {f"{adapter.family.layers}.{i}" for i in range(adapter.n_layers)}
    inside = tuple(f"{name}." for name in layers)
    above = {name for name in names if f"{adapter.family.layers}.".startswith(f"{name}.")}
    parts = [name for name in names if name not in above and not name.startswith(inside)]
    return {name: "cpu" for name in parts if not any(name.startswith(f"{other}.") for other in parts)}


def test_a_dispatched_model_is_edited_as_the_same_model_in_one_piece(family, family_models, random_tokenizer):
    texts = TemplateConfig(seeds=("The",), length=5)
    weights = []
    for spread in (False, True):
        adapter = ModelAdapter(copy.deepcopy(family_models[family]), random_tokenizer)
        if spread:
            dispatch_model(adapter.model, device_map(adapter), force_hooks=True)
            assert hasattr(find(adapter.layers[0], adapter.family.down), "_hf_hook")
            assert hasattr(find(adapter.layers[2], adapter.family.attention), "_hf_hook")
            adapter.check_forward(1e-5)
        layers = (0, LAYER)
        config = NSEConfig(layers=layers, covariance_weight=1, value=VALUE, templates=texts)
        moments = accumulate(adapter, layers, [[5, 9, 31, 7], [7, 12, 80, 3]], 64)
        moments = {layer: moment + torch.eye(adapter.d_ff) for layer, moment in moments.items()}
        editor = Editor(adapter, config=config, moments=moments, progress=False)
        before = adapter.down_weight(LAYER).clone()
        editor.edit(EDITS)
        assert not torch.equal(adapter.down_weight(LAYER), before)
        weights.append([adapter.down_weight(layer).clone() for layer in layers])
        editor.undo()
        assert torch.equal(adapter.down_weight(LAYER), before)
    for whole, spread in zip(*weights, strict=True):
        torch.testing.assert_close(spread, whole, rtol=1e-5, atol=1e-6)


def test_a_folder_is_loaded_with_a_device_map(random_llama, random_tokenizer, tmp_path):
    random_llama.float().save_pretrained(tmp_path)
    random_tokenizer.save_pretrained(tmp_path)
    parts = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    adapter = load_model(str(tmp_path), device={**parts, "lm_head": "cpu"})
    assert torch.equal(adapter.down_weight(2), random_llama.model.layers[2].mlp.down_proj.weight)
    assert load_model(str(tmp_path), device="auto").n_layers == 4


def put(module, device):
    """Fake parameters and buffers on a device that need not exist."""
    for part in module.modules():
        for kind in (part._parameters, part._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    kind[name] = torch.nn.Parameter(made, requires_grad=False) if kind is part._parameters else made


@pytest.fixture(params=[("entry", 2), (0, "exit")], ids=str)
def spread_adapter(request, family_adapter):
    """The family's model with some parts on another device than the rest: fake tensors, so that nothing is computed,
    yet an operation over two devices is an error, as it is between two GPUs. The device is called "meta" because that
    is the one that exists everywhere beside "cpu"."""
    adapter, row, head = family_adapter, family_adapter.family, family_adapter.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    entry = (row.embedding, row.embedding_norm, row.positions, row.project_in)
    places = {
        "entry": [find(adapter.model, path) for path in entry if path is not None],
        "exit": [head, *(find(adapter.model, path) for path in (row.final_norm, row.project_out) if path is not None)],
        **{i: [layer] for i, layer in enumerate(adapter.layers)},
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        put(adapter.model, "cpu")
        for place in request.param:
            for module in places[place]:
                if module is not None:
                    put(module, "meta")
        yield adapter


@pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4 mixes fake and real tensors in its rotary tables"
)
@pytest.mark.parametrize("family", ONE_PER_ROW)
def test_every_tensor_goes_to_the_device_of_the_module_that_uses_it(spread_adapter):
    adapter, home = spread_adapter, spread_adapter.device
    layers = (0, LAYER)
    assert {part.device.type for part in adapter.model.parameters()} == {"cpu", "meta"}
    weights = EditableWeights(adapter, layers)
    with torch.no_grad(), adapter.packed():
        sweep = KeySweep(adapter, EDITS, ["{}", "The old house. {}"], layers)
        for captured in sweep:
            keys, mass = sweep.keys(captured)
            assert {part.device for part in (captured.hidden, keys, mass)} == {home}
            chosen = torch.zeros(5, dtype=torch.int64, device=home)
            saved = weights.columns(captured.layer, chosen)
            weights.add(captured.layer, chosen, captured.hidden, torch.zeros(5, 2, device=home))
            weights.restore(captured.layer, chosen, saved)
    with adapter.packed():
        rewrites = rewrite_sequences(adapter.tokenizer, EDITS, ["{}", "The old house. {}"])
        subjects = subject_sequences(adapter.tokenizer, EDITS)
        sequences = [[*rows, subject] for rows, subject in zip(rewrites, subjects, strict=True)]
        group = ValueLoss(adapter, sequences, LAYER, VALUE, adapter)
        for _ in range(2):
            losses, grads, top1 = group.evaluate(torch.zeros_like(group.hidden))
            assert {part.device for part in (losses, grads, top1)} == {home}
    moments = accumulate(adapter, (0, 2), [[5, 9, 31, 7], [7, 12, 80, 3]], 64)
    assert [moments[layer].device for layer in (0, 2)] == [adapter.layer_device(0), adapter.layer_device(2)]


@pytest.mark.parametrize("family", ONE_PER_ROW)
def test_an_operation_over_two_devices_is_noticed(spread_adapter):
    for layer in range(3):
        device = spread_adapter.layer_device(layer)
        other = torch.zeros(3, spread_adapter.d_model, device="meta" if device.type == "cpu" else "cpu")
        with pytest.raises(RuntimeError, match=r"two .*devices"):
            find(spread_adapter.layers[layer], spread_adapter.family.gate)(other)


def test_the_repr_is_one_line_with_the_model_sizes_and_source(random_adapter):
    assert repr(random_adapter) == (
        "ModelAdapter(LlamaForCausalLM, layers=4, d_model=32, d_ff=48, dtype=float64, device=cpu, source=None)"
    )
    random_adapter.source = "smollm2-135m"
    random_adapter.model.to(torch.bfloat16)
    assert repr(random_adapter).endswith("dtype=bfloat16, device=cpu, source='smollm2-135m')")
