"""One row per model family: where its parts are, and the few things that differ, as data.

A row describes a decoder layer as
    sum    = rows + attention(attention_norm(rows))
    output = sum + down(activation(gate(x)) * up(x))        x = ffn_norm(sum), or of `rows` in a parallel layer
and each norm that a family has in another place, or lacks, is a field. A model is matched by structure, never by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.model.packed_attention import Plan, Rotary
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

QUANTISED = (
    "an update cannot be added to such a weight; load the model in bfloat16 or float32, edit it, and quantise what"
    " save_pretrained wrote"
)

Attend = Callable[[Any, Tensor, Plan, tuple[Tensor, Tensor] | None], Tensor]
Rotate = Callable[[Any, Tensor, torch.dtype], Rotary]


class UnsupportedModel(ValueError):
    """The model is of no known family, cannot be written to, or its own forward differs from ours."""


def attend_by_interface(module: Any, rows: Tensor, plan: Plan, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Attention modules that call transformers' attention interface, which `ModelAdapter.packed` answers."""
    return module(hidden_states=rows[None], position_embeddings=rotary, attention_mask=None, packed_plan=plan)[0][0]


def attend_in_pairs(module: Any, rows: Tensor, plan: Plan, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """GPT-J's attention, which calls no interface: neighbouring elements turn together, and scores are float32."""
    if rotary is None:
        raise ValueError("attend_in_pairs: a row that uses it needs rotary tables")
    shape = (1, rows.shape[0], module.num_attention_heads, module.head_dim)
    query, key, value = (
        project(rows).view(shape).transpose(1, 2) for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    working = torch.promote_types(rows.dtype, torch.float32)
    query, key = (_turn_pairs(part, *rotary).to(working) for part in (query, key))
    mixed = plan(module.layer_idx, query, key, value.to(working), module.head_dim**-0.5)
    return module.out_proj(mixed[0].flatten(1).to(rows.dtype))


def _turn_pairs(part: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """part: (1, n_heads, n_rows, head_dim), of which the first pairs turn; cosine, sine: (1, n_rows, n_pairs)."""
    width = 2 * cosine.shape[-1]
    even, odd = part[..., 0:width:2], part[..., 1:width:2]
    turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1).flatten(-2)
    return torch.cat((turned, part[..., width:]), dim=-1)


def rotate_by_module(module: Any, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """Tables of a rotary embedding module for positions (n_rows,), one per layer type if it has several."""
    like = torch.empty(0, dtype=dtype, device=positions.device)
    kinds = getattr(module, "layer_types", None)
    if kinds is None:
        return Rotary({"": module(like, positions[None])})
    return Rotary({kind: module(like, positions[None], kind) for kind in kinds})


def rotate_by_table(table: Tensor, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """Rows of a table (n_positions, rotary_dim), sines before cosines, one per pair."""
    sine, cosine = table[positions.to(table.device)].to(dtype).chunk(2, dim=-1)
    return Rotary({"": (cosine[None], sine[None])})


def _part(what: str, default: Any = MISSING) -> Any:
    return field(metadata={"what": what}, **({} if default is MISSING else {"default": default}))


@dataclass(frozen=True)
class Family:
    """A family's row; `Family.needs()` says what each field holds.

    Paths of `layers`, `embedding`, `final_norm`, `rotary`, `positions`, `project_in` and `project_out` start at the
    model, all others at one decoder layer. A layer must have exactly the children `layer_modules`: an unknown extra (a
    norm behind the feed-forward, say) changes the mathematics, so such a model is not of this family.
    """

    name: str = _part("what to call it")
    layers: str = _part("path of the list of decoder layers")
    embedding: str = _part("path of the token embedding")
    attention: str = _part("path of the attention in a layer")
    gate: str = _part("path of the projection into the neurons that the activation is taken of, in a layer")
    down: str = _part("path of the projection out of the neurons, whose weight is edited, in a layer")
    layer_modules: frozenset[str] = _part("names of all children of a decoder layer")
    final_norm: str | None = _part("path of the norm before the head", None)
    rotary: str | None = _part("path of the rotary embedding", None)
    positions: str | None = _part("path of learned position embeddings", None)
    project_in: str | None = _part("path of a projection behind the embedding, used if the model has it", None)
    project_out: str | None = _part("path of a projection before the head, used if the model has it", None)
    up: str | None = _part("path of the projection that multiplies the activation; gate's path = both in one", None)
    attention_norm: str | None = _part("norm of what attention reads", None)
    attention_out_norm: str | None = _part("norm of what attention gives, before it is added", None)
    sum_norm: str | None = _part("norm of the sum behind attention", None)
    ffn_norm: str | None = _part("norm of what the feed-forward reads; None = attention's, in a parallel layer", None)
    ffn_out_norm: str | None = _part("norm of what the feed-forward gives, before it is added", None)
    output_norm: str | None = _part("norm of the layer's output", None)
    parallel: bool = _part("True when attention and feed-forward read the same rows", False)
    activation: str = _part("name of the config entry that names the activation", "hidden_act")
    config: tuple[tuple[str, object], ...] = _part("(name, value) of config entries that the model must have", ())
    rotate: Rotate = field(default=rotate_by_module, metadata={"what": "function that makes the rotary tables"})
    attend: Attend = field(default=attend_by_interface, metadata={"what": "function that runs an attention module"})

    @property
    def post_norm(self) -> bool:
        """True when a norm stands between the down-projection and the layer's output: that is not h0 + W k then."""
        return self.ffn_out_norm is not None or self.output_norm is not None

    def misfits(self, model: Any) -> list[str]:
        """What keeps `model` from being of this family; empty when it is."""
        whole = (self.layers, self.embedding, self.final_norm, self.rotary, self.positions)
        found = [f"has no {path}" for path in whole if not _has(model, path)]
        layers = find(model, self.layers)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            return [*found, f"{self.layers} is no list of layers"]
        names = {name for name, _ in layers[0].named_children()}
        found += [f"a layer has no {name}" for name in sorted(self.layer_modules - names)]
        found += [f"a layer has {name}" for name in sorted(names - self.layer_modules)]
        parts = (self.attention, self.gate, self.up, self.down, self.attention_norm, self.attention_out_norm)
        norms = (self.sum_norm, self.ffn_norm, self.ffn_out_norm, self.output_norm)
        inner = sorted({path for path in (*parts, *norms) if path is not None and "." in path})
        found += [f"a layer has no {path}" for path in inner if not _has(layers[0], path)]
        for name, value in self.config:
            if (got := getattr(text_config(model), name, None)) != value:
                found.append(f"its config has {name}={got!r}, not {value!r}")
        return found

    @classmethod
    def needs(cls) -> str:
        """What a row is made of, a line per field."""
        return "\n".join(
            f"  {part.name}{'' if part.default is MISSING else ' (optional)'}: {part.metadata['what']}"
            for part in fields(cls)
        )


def find(module: Any, path: str) -> Any:
    """The part of `module` at a dotted path, or None."""
    found = module
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


def text_config(model: Any) -> Any:
    """The config of a model's language part, or of the whole model where there is no other."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def max_positions(config: Any) -> int:
    """As many positions as the model has, or fewer where our passes would differ from its own beyond them: behind a
    sliding window they would see too much, and a "longrope" turns otherwise in longer texts."""
    limits = [config.max_position_embeddings, getattr(config, "sliding_window", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for table in [rope] if "rope_type" in rope else rope.values():
        if isinstance(table, dict) and table.get("rope_type") == "longrope":
            limits.append(table.get("original_max_position_embeddings"))
    return min(int(limit) for limit in limits if limit)


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

PHI3 = replace(
    LLAMA,
    name="phi3",
    gate="mlp.gate_up_proj",
    up="mlp.gate_up_proj",
    layer_modules=LLAMA.layer_modules | {"resid_attn_dropout", "resid_mlp_dropout"},
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

GEMMA_VISION = replace(
    GEMMA,
    name="gemma with images",
    layers="model.language_model.layers",
    embedding="model.language_model.embed_tokens",
    final_norm="model.language_model.norm",
    rotary="model.language_model.rotary_emb",
)

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

# opt-350m alone: its norms stand behind the sums.
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

FAMILIES = (
    *(LLAMA, PHI3, GEMMA, GEMMA_VISION, GPT2, GPTJ),
    *(NEOX, replace(NEOX, name="gpt-neox in sequence", parallel=False, config=(("use_parallel_residual", False),))),
    *(OPT, OPT_350M),
)


def choose(model: Any, families: Sequence[Family]) -> Family:
    """The first row that fits. Raises UnsupportedModel, which says what the closest one lacks and what a row needs."""
    misfits = [row.misfits(model) for row in families]
    for row, found in zip(families, misfits, strict=True):
        if not found:
            return row
    closest = min(range(len(families)), key=lambda i: len(misfits[i]), default=None)
    why = "" if closest is None else f"; {families[closest].name!r} comes closest, but {', '.join(misfits[closest])}"
    raise UnsupportedModel(
        f"{type(model).__name__}: no family row fits (known: {', '.join(row.name for row in families)}){why}.\n"
        f"Pass families=(Family(...),) with fastedit.model.families.Family, a row of\n{Family.needs()}"
    )


def refuse_quantised(name: str, config: Any) -> None:
    """Raise UnsupportedModel if a config says that the model's weights are quantised."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    method = str(getattr(method, "value", method))
    # GGUF alone is turned into plain numbers when it is loaded.
    if method != "gguf":
        raise UnsupportedModel(f"{name} is quantised ({method}): {QUANTISED}")


def check_weights(model: Any, family: Family, layers: nn.ModuleList) -> None:
    """Raise UnsupportedModel unless every down-projection holds numbers that an update can be added to."""
    refuse_quantised(type(model).__name__, model.config)
    for i, layer in enumerate(layers):
        weight = getattr(find(layer, family.down), "weight", None)
        if not isinstance(weight, Tensor) or weight.dtype not in WEIGHT_DTYPES or weight.ndim != 2:
            what = getattr(weight, "dtype", "no weight")
            raise UnsupportedModel(f"layer {i}: {family.down} is quantised ({what}): {QUANTISED}")
    offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded:
        raise UnsupportedModel(
            f"{type(model).__name__}: {len(offloaded)} weights are offloaded, {offloaded[0]} first; load it with a"
            " device_map that leaves every weight in memory"
        )


def activation_name(config: Any, entry: str) -> str:
    """Our name (see ops.capture_keys) of the activation that a config names. Raises UnsupportedModel for others."""
    name = getattr(config, entry, None)
    if name not in ACTIVATION_NAMES:
        raise UnsupportedModel(f"activation {name!r} is not known; known: {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]
