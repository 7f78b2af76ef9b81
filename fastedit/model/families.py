"""Model families as data: one row per family says where its parts are and how it differs from the others.

A row describes a decoder layer as
    sum    = rows + attention(attention_norm(rows))
    output = sum + down(activation(gate(x)) * up(x))        x = ffn_norm(sum), or ffn_norm(rows) in a parallel layer
Further norms, and factors that the config names, are optional fields. The family of a model is chosen by the model's
structure, and by entries of its config where models of one structure compute different things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from torch import Tensor, nn

from fastedit.model.attention_modules import (
    Attend,
    Rotate,
    attend_before_scaling,
    attend_by_interface,
    attend_fused,
    attend_fused_in_pairs,
    attend_fused_with_bias,
    attend_fused_with_scaled_bias,
    attend_in_pairs,
    attend_unscaled,
    bias_by_position,
    bias_in_bfloat16,
    rotate_by_module,
    rotate_by_table,
)
from fastedit.ops.apply_delta import WEIGHT_DTYPES

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# The end of the error for a quantised model.
QUANTISED = (
    "an update cannot be added to such a weight; load the model in bfloat16 or float32, edit it, and quantise what"
    " save_pretrained wrote"
)


class UnsupportedModel(ValueError):
    """A model of no known family, one whose weights cannot be edited, or one whose logits packed passes get wrong."""


def _part(what: str, default: Any = MISSING) -> Any:
    """A field of `Family` with the description that `Family.needs` prints."""
    return field(metadata={"what": what}, **({} if default is MISSING else {"default": default}))


@dataclass(frozen=True, repr=False)
class Family:
    """The row of a family; `Family.needs()` describes each field.

    Paths of `layers`, `embedding`, `embedding_norm`, `final_norm`, `rotary`, `positions`, `project_in` and
    `project_out` start at the model, all others at a decoder layer. A decoder layer must have exactly the children
    `layer_modules`: one more, such as a norm after the feed-forward, would change what the layer computes.
    """

    name: str = _part("the name of the family")
    layers: str = _part("path of the list of decoder layers")
    embedding: str = _part("path of the token embedding")
    attention: str = _part("path of the attention in a layer")
    gate: str = _part("path of the projection into the neurons to which the activation is applied, in a layer")
    down: str = _part("path of the projection out of the neurons, whose weight is edited, in a layer")
    layer_modules: frozenset[str] = _part("names of all children of a decoder layer")
    final_norm: str | None = _part("path of the norm before the head", None)
    embedding_norm: str | None = _part("path of a norm of the embedded tokens", None)
    rotary: str | None = _part("path of what the tables of positions are made from, such as a rotary embedding", None)
    positions: str | None = _part("path of learned position embeddings", None)
    project_in: str | None = _part("path of a projection after the embedding, used if the model has it", None)
    project_out: str | None = _part("path of a projection before the head, used if the model has it", None)
    up: str | None = _part("path of the projection that multiplies the activation; gate's path = both in one", None)
    attention_norm: str | None = _part("norm of what attention reads", None)
    attention_out_norm: str | None = _part("norm of the output of attention, before it is added", None)
    sum_norm: str | None = _part("norm of the sum after attention", None)
    ffn_norm: str | None = _part("norm of what the feed-forward reads; None = attention's, in a parallel layer", None)
    ffn_out_norm: str | None = _part("norm of the output of the feed-forward, before it is added", None)
    output_norm: str | None = _part("norm of the layer's output", None)
    parallel: bool = _part("True when attention and feed-forward read the same rows", False)
    embedding_factor: str | None = _part("config entry by which embedded tokens are multiplied", None)
    residual_factor: str | None = _part("config entry by which both halves' outputs are multiplied", None)
    logit_factor: str | None = _part("config entry by which logits are multiplied; 1/ENTRY divides", None)
    activation: str = _part("config entry that names the activation, or the activation itself", "hidden_act")
    n_positions: int | None = _part("positions of a text, if neither its config nor the model bounds them", None)
    config: tuple[tuple[str, object], ...] = _part("(name, value) of config entries that the model must have", ())
    rotate: Rotate = field(default=rotate_by_module, metadata={"what": "function that makes the rotary tables"})
    attend: Attend = field(default=attend_by_interface, metadata={"what": "function that runs an attention module"})

    def __repr__(self) -> str:
        return f"Family({self.name!r})"

    @property
    def post_norm(self) -> bool:
        """Whether a norm follows the down-projection, so that the layer's output is not residual + W k."""
        return self.ffn_out_norm is not None or self.output_norm is not None

    def misfits(self, model: Any) -> list[str]:
        """Why `model` is not of this family, one phrase per reason; empty if it is."""
        paths = (self.layers, self.embedding, self.embedding_norm, self.final_norm, self.rotary, self.positions)
        reasons = [f"has no {path}" for path in paths if not _has(model, path)]

        layers = find(model, self.layers)
        if isinstance(layers, nn.ModuleList) and len(layers):
            reasons += self.layers_misfits(layers)
        else:
            reasons.append(f"{self.layers} is no list of layers")

        for name, value in self.config:
            if (actual := getattr(text_config(model), name, None)) != value:
                reasons.append(f"its config has {name}={actual!r}, not {value!r}")

        return reasons

    def layers_misfits(self, layers: nn.ModuleList) -> list[str]:
        """As `misfits`, for all decoder layers; a reason that not all layers share names those that it holds for."""
        numbers: dict[str, list[int]] = {}
        for i, layer in enumerate(layers):
            for reason in self._layer_misfits(layer):
                numbers.setdefault(reason, []).append(i)

        return [
            f"a layer {reason}" if len(found) == len(layers) else f"{_layers_named(found)} {reason}"
            for reason, found in numbers.items()
        ]

    def _layer_misfits(self, layer: nn.Module) -> list[str]:
        """As `misfits`, for one decoder layer, each reason without its subject."""
        children = {name for name, _ in layer.named_children()}
        reasons = [f"has no {name}" for name in sorted(self.layer_modules - children)]
        reasons += [f"has {name}" for name in sorted(children - self.layer_modules)]

        parts = (self.attention, self.gate, self.up, self.down, self.attention_norm, self.attention_out_norm)
        norms = (self.sum_norm, self.ffn_norm, self.ffn_out_norm, self.output_norm)
        nested = sorted({path for path in (*parts, *norms) if path is not None and "." in path})
        missing = [path for path in nested if not _has(layer, path)]

        owner = self.down.rpartition(".")[0]
        if owner and _has(layer, f"{owner}.experts"):
            reasons.append(f"has a mixture of experts in {owner}, no dense feed-forward")
            missing = [path for path in missing if not path.startswith(f"{owner}.")]

        return [*reasons, *(f"has no {path}" for path in missing)]

    @classmethod
    def needs(cls) -> str:
        """A description of every field, one line each, for errors."""
        return "\n".join(
            f"  {part.name}{'' if part.default is MISSING else ' (optional)'}: {part.metadata['what']}"
            for part in fields(cls)
        )


def _layers_named(numbers: Sequence[int]) -> str:
    """ "layer 2", or "layers 2, 3", at most four of them by number; each reason behind it stays in the singular."""
    shown = ", ".join(map(str, numbers[:4]))
    more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""

    return f"layer {shown}{more}" if len(numbers) == 1 else f"each of layers {shown}{more}"


def find(module: Any, path: str) -> Any:
    """The part of `module` at a dotted path, or None if there is none."""
    part = module

    for name in path.split("."):
        part = getattr(part, name, None)
        if part is None:
            return None

    return part


def text_config(model: Any) -> Any:
    """The config of a model's language part: a part of the config in a model that reads images too, else all of it."""
    config: Any = getattr(model, "config", None)

    return config.get_text_config() if hasattr(config, "get_text_config") else config


# Names under which configs keep the number of positions, or the width of a window.
POSITION_ENTRIES = ("max_position_embeddings", "seq_length", "sliding_window")


def max_positions(config: Any, otherwise: int | None = None) -> int:
    """The number of positions up to which packed passes equal the model's own, at most as many as the model has.

    Packed passes know no sliding window, not the other rotary factors of a "longrope" in longer texts, and no scale of
    queries that depends on the position (Ministral 3).
    otherwise: the number for a config that names none
    Raises UnsupportedModel for a config that names no such number."""
    limits = [getattr(config, name, None) for name in POSITION_ENTRIES]
    if "local" in (getattr(config, "attention_layers", None) or ()):
        limits.append(getattr(config, "window_size", None))

    # transformers 4 calls it rope_scaling, and keeps the number beside it.
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    beside = getattr(config, "original_max_position_embeddings", None)
    for table in [rope] if rope.keys() & {"rope_type", "type"} else rope.values():
        if not isinstance(table, dict):
            continue
        if "longrope" in (table.get("rope_type"), table.get("type")) or table.get("llama_4_scaling_beta"):
            limits.append(table.get("original_max_position_embeddings") or beside)

    known = [int(limit) for limit in limits if limit] or ([] if otherwise is None else [otherwise])
    if not known:
        raise UnsupportedModel(f"{type(config).__name__}: no max_position_embeddings, so no text has a known room")

    return min(known)


def _has(module: Any, path: str | None) -> bool:
    return path is None or find(module, path) is not None


LLAMA = Family(
    name="llama",
    layers="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    rotary="model.rotary_emb",
    attention="self_attn",
    attention_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    layer_modules=frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}),
)

# Structured as Llama, but its attention wants to know the positions.
MINISTRAL_3 = replace(LLAMA, name="ministral 3", attend=attend_before_scaling, config=(("model_type", "ministral3"),))

GRANITE = replace(
    LLAMA,
    name="granite",
    embedding_factor="embedding_multiplier",
    residual_factor="residual_multiplier",
    logit_factor="1/logits_scaling",
    config=(("model_type", "granite"),),
)

COHERE = replace(
    LLAMA,
    name="cohere",
    ffn_norm=None,
    layer_modules=LLAMA.layer_modules - {"post_attention_layernorm"},
    parallel=True,
    logit_factor="logit_scale",
)

STABLELM = replace(LLAMA, name="stablelm", layer_modules=LLAMA.layer_modules | {"dropout"})

STABLELM_PARALLEL = replace(
    STABLELM,
    name="stablelm in parallel",
    ffn_norm=None,
    layer_modules=STABLELM.layer_modules - {"post_attention_layernorm"},
    parallel=True,
)

STARCODER2 = replace(LLAMA, name="starcoder2", gate="mlp.c_fc", up=None, down="mlp.c_proj")

PHI = replace(
    LLAMA,
    name="phi",
    final_norm="model.final_layernorm",
    ffn_norm=None,
    gate="mlp.fc1",
    up=None,
    down="mlp.fc2",
    layer_modules=frozenset({"self_attn", "mlp", "input_layernorm", "resid_dropout"}),
    parallel=True,
)

PHI3 = replace(
    LLAMA,
    name="phi3",
    gate="mlp.gate_up_proj",
    up="mlp.gate_up_proj",
    layer_modules=LLAMA.layer_modules | {"resid_attn_dropout", "resid_mlp_dropout"},
)

GLM = replace(LLAMA, name="glm", gate="mlp.gate_up_proj", up="mlp.gate_up_proj")

GLM4 = replace(
    GLM,
    name="glm4",
    attention_out_norm="post_self_attn_layernorm",
    ffn_out_norm="post_mlp_layernorm",
    layer_modules=LLAMA.layer_modules | {"post_self_attn_layernorm", "post_mlp_layernorm"},
)

OLMO2 = replace(
    LLAMA,
    name="olmo2",
    attention_norm=None,
    attention_out_norm="post_attention_layernorm",
    ffn_norm=None,
    ffn_out_norm="post_feedforward_layernorm",
    layer_modules=LLAMA.layer_modules - {"input_layernorm"} | {"post_feedforward_layernorm"},
)

GEMMA = replace(
    LLAMA,
    name="gemma",
    attention_out_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_out_norm="post_feedforward_layernorm",
    layer_modules=LLAMA.layer_modules | {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
    activation="hidden_activation",
)


def _with_images(row: Family) -> Family:
    """The row of a model that reads images too, whose language model, below `model.language_model`, is of another row.

    Texts alone are edited and measured. The rotary embedding of Qwen 2 and 3 VL gives a text its positions three times,
    so that its tables are the ordinary ones."""
    paths: dict[str, Any] = {
        name: f"model.language_model.{path.removeprefix('model.')}"
        for name in ("layers", "embedding", "final_norm", "rotary")
        if (path := getattr(row, name)) is not None
    }

    return replace(row, name=f"{row.name} with images", **paths)


GPT2 = Family(
    name="gpt2",
    layers="transformer.h",
    embedding="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    attention="attn",
    attention_norm="ln_1",
    ffn_norm="ln_2",
    gate="mlp.c_fc",
    down="mlp.c_proj",
    layer_modules=frozenset({"ln_1", "attn", "ln_2", "mlp"}),
    activation="activation_function",
)

GPTJ = replace(
    GPT2,
    name="gptj",
    positions=None,
    rotary="transformer.h.0.attn.embed_positions",
    ffn_norm=None,
    gate="mlp.fc_in",
    down="mlp.fc_out",
    layer_modules=frozenset({"ln_1", "attn", "mlp"}),
    parallel=True,
    rotate=rotate_by_table,
    attend=attend_in_pairs,
)

# From transformers 5.24 on, all layers share one table.
GPTJ_SHARED = replace(GPTJ, name="gptj with one table", rotary="transformer.rotary_emb.embed_positions")

CODEGEN = replace(GPTJ, name="codegen", attend=attend_fused_in_pairs, config=(("model_type", "codegen"),))
CODEGEN_SHARED = replace(CODEGEN, name="codegen with one table", rotary=GPTJ_SHARED.rotary)

GPT_NEO = replace(GPT2, name="gpt-neo", attention="attn.attention", attend=attend_unscaled)

FALCON = Family(
    name="falcon",
    layers="transformer.h",
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    rotary="transformer.rotary_emb",
    attention="self_attention",
    attention_norm="input_layernorm",
    gate="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    layer_modules=frozenset({"self_attention", "mlp", "input_layernorm"}),
    parallel=True,
    activation="activation",
    config=(("alibi", False),),
    attend=attend_fused,
)

# 40B and 180B: attention and feed-forward have a norm each.
FALCON_NEW = replace(
    FALCON,
    name="falcon with two norms",
    attention_norm="ln_attn",
    ffn_norm="ln_mlp",
    layer_modules=FALCON.layer_modules - {"input_layernorm"} | {"ln_attn", "ln_mlp"},
)

FALCON_IN_SEQUENCE = replace(
    FALCON,
    name="falcon in sequence",
    ffn_norm="post_attention_layernorm",
    layer_modules=FALCON.layer_modules | {"post_attention_layernorm"},
    parallel=False,
)

# RefinedWeb's models.
FALCON_WITH_ALIBI = replace(
    FALCON_IN_SEQUENCE,
    name="falcon with alibi",
    rotary="transformer",
    config=(("alibi", True),),
    rotate=bias_in_bfloat16,
    attend=attend_fused_with_scaled_bias,
)

BLOOM = Family(
    name="bloom",
    layers="transformer.h",
    embedding="transformer.word_embeddings",
    embedding_norm="transformer.word_embeddings_layernorm",
    final_norm="transformer.ln_f",
    rotary="transformer",
    attention="self_attention",
    attention_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    gate="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    layer_modules=frozenset({"self_attention", "mlp", "input_layernorm", "post_attention_layernorm"}),
    activation="gelu_new",
    # Its texts had 2048 tokens in training, which not every config says.
    n_positions=2048,
    config=(("apply_residual_connection_post_layernorm", False),),
    rotate=bias_by_position,
    attend=attend_fused_with_bias,
)

NEOX = Family(
    name="gpt-neox",
    layers="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    rotary="gpt_neox.rotary_emb",
    attention="attention",
    attention_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    gate="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    layer_modules=frozenset(
        {"attention", "mlp", "input_layernorm", "post_attention_layernorm"}
        | {"post_attention_dropout", "post_mlp_dropout"}
    ),
    parallel=True,
    config=(("use_parallel_residual", True),),
)

OPT = Family(
    name="opt",
    layers="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    final_norm="model.decoder.final_layer_norm",
    project_in="model.decoder.project_in",
    project_out="model.decoder.project_out",
    attention="self_attn",
    attention_norm="self_attn_layer_norm",
    ffn_norm="final_layer_norm",
    gate="fc1",
    down="fc2",
    layer_modules=frozenset({"self_attn", "activation_fn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"}),
    activation="activation_function",
    config=(("do_layer_norm_before", True), ("_remove_final_layer_norm", False)),
)

# Only opt-350m: its norms follow the sums.
OPT_350M = replace(
    OPT,
    name="opt-350m",
    final_norm=None,
    attention_norm=None,
    sum_norm="self_attn_layer_norm",
    ffn_norm=None,
    output_norm="final_layer_norm",
    config=(("do_layer_norm_before", False),),
)

# The first row that fits is taken: one that another row fits too stands in front of that.
FAMILIES = (
    *(MINISTRAL_3, GRANITE, LLAMA, COHERE, STABLELM, STABLELM_PARALLEL, STARCODER2, PHI, PHI3, GLM, GLM4, OLMO2),
    *(
        GEMMA,
        *map(_with_images, (MINISTRAL_3, LLAMA, GEMMA)),
        GPT_NEO,
        GPT2,
        CODEGEN,
        CODEGEN_SHARED,
        GPTJ,
        GPTJ_SHARED,
    ),
    *(NEOX, replace(NEOX, name="gpt-neox in sequence", parallel=False, config=(("use_parallel_residual", False),))),
    *(FALCON, FALCON_NEW, FALCON_IN_SEQUENCE, FALCON_WITH_ALIBI, BLOOM, OPT, OPT_350M),
)


def refuse_wrapped(model: Any) -> None:
    """Raise UnsupportedModel, which says what to give instead, unless this is a bare causal language model."""
    name = type(model).__name__

    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UnsupportedModel(f"{name} only spreads a model over devices: give what it wraps, model.module")
    if not isinstance(model, nn.Module) or getattr(model, "config", None) is None:
        raise UnsupportedModel(f"{name} is no model of transformers: load one with AutoModelForCausalLM")

    get_head = getattr(model, "get_output_embeddings", None)
    if get_head is None or get_head() is None:
        raise UnsupportedModel(f"{name} has no language-model head: load it with AutoModelForCausalLM")


def refuse_quantised(name: str, config: Any) -> None:
    """Raise UnsupportedModel if the config of the model `name` says that its weights are quantised."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return

    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    method = str(getattr(method, "value", method))

    # Weights from GGUF are dequantised when they are loaded.
    if method != "gguf":
        raise UnsupportedModel(f"{name} is quantised ({method}): {QUANTISED}")


def check_weights(model: Any, family: Family, layers: nn.ModuleList) -> None:
    """Raise UnsupportedModel unless an update can be added to the weight of every down-projection."""
    refuse_quantised(type(model).__name__, model.config)

    for i, layer in enumerate(layers):
        weight = getattr(find(layer, family.down), "weight", None)
        if not isinstance(weight, Tensor) or weight.dtype not in WEIGHT_DTYPES or weight.ndim != 2:
            what = getattr(weight, "dtype", "no weight")
            raise UnsupportedModel(f"layer {i}: {family.down} is quantised ({what}): {QUANTISED}")

    offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded:
        raise UnsupportedModel(
            f"{type(model).__name__}: {len(offloaded)} weights are offloaded, {offloaded[0]} first, and offloaded"
            " weights cannot be edited; load it with a device_map that leaves every weight in memory, or whole on the"
            " CPU, in bfloat16 if it is large"
        )


def activation_name(config: Any, entry: str) -> str:
    """The activation's name in :mod:`fastedit.ops.capture_keys`, from the config's `entry`, or `entry` itself.

    Raises UnsupportedModel for an unknown activation."""
    name = getattr(config, entry, entry if entry in ACTIVATION_NAMES else None)

    if name not in ACTIVATION_NAMES:
        raise UnsupportedModel(f"activation {name!r} is not known; known: {', '.join(ACTIVATION_NAMES)}")

    return ACTIVATION_NAMES[name]


def factor(config: Any, entry: str | None) -> float:
    """The number in the config's `entry`, or one over it for "1/ENTRY"; 1 for None.

    Raises UnsupportedModel for an entry that is missing or no number other than 0."""
    if entry is None:
        return 1.0

    name = entry.removeprefix("1/")
    number = getattr(config, name, None)
    if not isinstance(number, (int, float)) or not number:
        raise UnsupportedModel(f"{type(config).__name__}: {name} is {number!r}, and a number other than 0 is needed")

    return float(number) if name == entry else 1 / float(number)
