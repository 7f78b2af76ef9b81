"""One row per model family: where its parts are, found by structure. The only importer of transformers.

Everything above this module sees a model as: embed -> per layer (mix, feed-forward) -> final norm -> head, on packed
rows (see :mod:`fastedit.attention`), with the down-projection weight W of every layer as (d_model, d_ff).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastedit.attention import Plan, plan_sequences

PACKED_ATTENTION = "fastedit_packed"

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class Family:
    """Names of a family's modules. Paths are relative to the model, layer paths to one decoder layer.

    layer_modules are exactly the children a decoder layer must have: an unknown extra (a norm after the
    feed-forward, say) changes the mathematics, so such a model is not of this family.
    """

    name: str
    layers: str
    embedding: str
    final_norm: str
    rotary: str
    attention_norm: str
    attention: str
    ffn_norm: str
    ffn: str
    gate: str
    up: str
    down: str
    layer_modules: frozenset[str]

    def matches(self, model: nn.Module) -> bool:
        """True when every path exists in `model` and its decoder layers have no other parts."""
        paths = (self.layers, self.embedding, self.final_norm, self.rotary)
        if any(_find(model, path) is None for path in paths):
            return False
        layers = _find(model, self.layers)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            return False
        names = {name for name, _ in layers[0].named_children()}
        parts = (self.gate, self.up, self.down)
        return names == self.layer_modules and all(_find(layers[0], path) is not None for path in parts)


FAMILIES = (
    Family(
        name="llama",
        layers="model.layers",
        embedding="model.embed_tokens",
        final_norm="model.norm",
        rotary="model.rotary_emb",
        attention_norm="input_layernorm",
        attention="self_attn",
        ffn_norm="post_attention_layernorm",
        ffn="mlp",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
        layer_modules=frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}),
    ),
)


class Mixed(NamedTuple):
    """A decoder layer after its attention: output = residual + feed_forward(ffn_input), each (n_rows, d_model)."""

    residual: Tensor
    ffn_input: Tensor


class UnsupportedModel(ValueError):
    """The model is of no known family, or its own forward differs from ours."""


class ModelAdapter:
    """A causal language model and its tokenizer, seen through its family's row.

    model: a transformers causal language model; its weights are the ones edited
    tokenizer: the matching fast tokenizer (character offsets are needed)
    Raises UnsupportedModel when no row of `families` fits.
    """

    def __init__(self, model: Any, tokenizer: Any, families: tuple[Family, ...] = FAMILIES) -> None:
        family = next((row for row in families if row.matches(model)), None)
        if family is None:
            known = ", ".join(row.name for row in families)
            raise UnsupportedModel(
                f"{type(model).__name__}: no family row fits (known: {known}); pass families=(Family(...),) naming"
                f" its parts: {', '.join(Family.__dataclass_fields__)}"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedModel(f"{type(tokenizer).__name__}: a fast tokenizer with character offsets is needed")
        self.model = model
        self.tokenizer = tokenizer
        self.family = family
        self.layers: nn.ModuleList = _get(model, family.layers)
        first = _get(self.layers[0], family.down).weight
        self.d_model, self.d_ff = int(first.shape[0]), int(first.shape[1])
        self.n_layers = len(self.layers)
        self.activation_name = _activation_name(model.config.hidden_act)
        # Inside a sliding window attention is full; beyond it our plans would see too much, so nothing goes there.
        window = getattr(model.config, "sliding_window", None) or model.config.max_position_embeddings
        self.max_positions = min(int(model.config.max_position_embeddings), int(window))

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where token ids go."""
        return _get(self.model, self.family.embedding).weight.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights and of the hidden states."""
        return _get(self.model, self.family.embedding).weight.dtype

    @property
    def head_weight(self) -> Tensor:
        """Unembedding, (n_vocabulary, d_model)."""
        return self.model.get_output_embeddings().weight.detach()

    def down_weight(self, layer: int) -> nn.Parameter:
        """The down-projection W of a layer, (d_model, d_ff): the parameter itself, not a copy."""
        return self._part(layer, self.family.down).weight

    def weight_name(self, layer: int) -> str:
        """Full parameter name of `down_weight(layer)` in the model's state dict."""
        return f"{self.family.layers}.{layer}.{self.family.down}.weight"

    @contextlib.contextmanager
    def packed(self) -> Iterator[None]:
        """Prepare the model for packed rows: own attention core, eval mode, frozen weights. All restored on exit."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, _attend)
        config = _get(self.layers[0], self.family.attention).config
        before, training = config._attn_implementation, self.model.training
        learning = [p for p in self.model.parameters() if p.requires_grad]
        config._attn_implementation = PACKED_ATTENTION
        self.model.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            config._attn_implementation = before
            self.model.train(training)
            for parameter in learning:
                parameter.requires_grad_(True)

    def weights_hash(self, layer: int) -> str:
        """SHA-256 over the embedding and all layers up to `layer`: everything that keys there depend on."""
        digest = hashlib.sha256()
        for module in (_get(self.model, self.family.embedding), *self.layers[: layer + 1]):
            for name, parameter in module.named_parameters():
                digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
                digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def embed(self, token_ids: Tensor) -> Tensor:
        """(n_rows,) token ids -> (n_rows, d_model) rows entering layer 0."""
        return _get(self.model, self.family.embedding)(token_ids)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(n_rows,) positions -> cosine and sine, each (1, n_rows, head_dim)."""
        like = torch.empty(0, dtype=self.dtype, device=positions.device)
        return _get(self.model, self.family.rotary)(like, positions[None])

    def mix(self, layer: int, rows: Tensor, plan: Plan, rotary: tuple[Tensor, Tensor]) -> Mixed:
        """First half of a decoder layer on packed rows (n_rows, d_model): attention and the norm behind it."""
        normed = self._part(layer, self.family.attention_norm)(rows)
        attention = self._part(layer, self.family.attention)
        out = attention(hidden_states=normed[None], position_embeddings=rotary, attention_mask=None, packed_plan=plan)[
            0
        ]
        residual = rows + out[0]
        return Mixed(residual, self._part(layer, self.family.ffn_norm)(residual))

    def gate_up(self, layer: int, ffn_input: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up projections of (n_rows, d_model) rows, each (n_rows, d_ff)."""
        return self._part(layer, self.family.gate)(ffn_input), self._part(layer, self.family.up)(ffn_input)

    def feed_forward(self, layer: int, mixed: Mixed) -> Tensor:
        """Second half of a decoder layer: (n_rows, d_model) rows entering the next layer."""
        return mixed.residual + self._part(layer, self.family.ffn)(mixed.ffn_input)

    def feed_forward_with_keys(self, layer: int, mixed: Mixed) -> tuple[Tensor, Tensor]:
        """Like `feed_forward`, and the keys of all rows: (n_rows, d_ff), the very input of the down-projection."""
        seen: list[Tensor] = []
        down = self._part(layer, self.family.down)
        hook = down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            rows = self.feed_forward(layer, mixed)
        finally:
            hook.remove()
        return rows, seen[0]

    def run(
        self,
        rows: Tensor,
        layers: range,
        plan: Plan,
        rotary: tuple[Tensor, Tensor],
        tail: Tensor | None = None,
    ) -> Tensor:
        """Whole decoder layers on packed rows. With `tail` (row indices) the last layer's feed-forward runs on
        those rows alone and (n_tail, d_model) is returned."""
        for layer in layers:
            mixed = self.mix(layer, rows, plan, rotary)
            if tail is not None and layer == layers[-1]:
                mixed = Mixed(mixed.residual[tail], mixed.ffn_input[tail])
            rows = self.feed_forward(layer, mixed)
        return rows

    def final_norm(self, rows: Tensor) -> Tensor:
        """The norm before the head, on (n_rows, d_model)."""
        return _get(self.model, self.family.final_norm)(rows)

    @torch.no_grad()
    def generate(self, token_ids: Tensor, n_new: int, top_k: int) -> Tensor:
        """Continue (n_sequences, length) token ids by exactly n_new tokens, (n_sequences, length + n_new).

        top_k = 1 is greedy; otherwise one of the top_k is drawn by its probability. End-of-text never comes. Unlike
        transformers' own loop it draws among top_k numbers and not the whole vocabulary, a fifth of the time here."""
        ids, cache, new = token_ids, None, token_ids
        for _ in range(n_new):
            out = self.model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = out.past_key_values, out.logits[:, -1].float()
            if self.tokenizer.eos_token_id is not None:
                logits[:, self.tokenizer.eos_token_id] = -torch.inf
            scores, tokens = logits.topk(min(top_k, logits.shape[1]), dim=1)
            drawn = torch.multinomial(torch.softmax(scores, dim=1), 1) if top_k > 1 else scores.argmax(1, keepdim=True)
            new = tokens.gather(1, drawn)
            ids = torch.cat([ids, new], dim=1)
        return ids

    def check_forward(self, tolerance: float = 1e-3) -> None:
        """Compare packed logits with the model's own on a short text; raise UnsupportedModel when they differ.

        Catches what structure cannot show: soft-capped logits, scaled embeddings, windows. Error is relative to the
        largest logit."""
        n_tokens = min(12, self.max_positions)
        ids = torch.arange(n_tokens, device=self.device) * 7 % self.head_weight.shape[0]
        with torch.no_grad():
            training = self.model.training
            expected = self.model.eval()(input_ids=ids[None]).logits[0].float()
            self.model.train(training)
            with self.packed():
                path = list(range(n_tokens))
                plan = plan_sequences([path], [path], n_tokens).to(self.device)
                rotary = self.rotary(torch.arange(n_tokens, device=self.device))
                rows = self.final_norm(self.run(self.embed(ids), range(self.n_layers), plan, rotary))
                found = (rows @ self.head_weight.T).float()
        error = float((found - expected).abs().max() / expected.abs().max())
        bound = tolerance if self.dtype == torch.float32 else 50 * tolerance
        if not error <= bound:
            raise UnsupportedModel(
                f"{type(self.model).__name__} looks like family {self.family.name!r}, but its forward differs"
                f" (relative error {error:.1e}, allowed {bound:.0e}): it needs a row of its own"
            )

    def _part(self, layer: int, path: str) -> Any:
        return _get(self.layers[layer], path)


def load_transformers(place: str, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) from a hub id, a folder, or a GGUF file; weights frozen, evaluation mode.

    A model read from GGUF is copied into a fresh one of its config, which transformers will save again."""
    import transformers
    from transformers.utils import logging as messages

    kind = getattr(torch, dtype)
    shown = messages.is_progress_bar_enabled()
    messages.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return _read_model(transformers, place, kind)
    finally:
        if shown:
            messages.enable_progress_bar()  # type: ignore[no-untyped-call]


def _read_model(transformers: Any, place: str, kind: torch.dtype) -> tuple[Any, Any]:
    if not place.endswith(".gguf"):
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=kind)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    else:
        folder, file = os.path.split(place)
        read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=kind)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = type(read)(config)
        model = model.to(kind)
        model.load_state_dict(read.state_dict(), assign=True)
        model.tie_weights()
        # Buffers that are computed, not stored, were made on the meta device.
        for name, buffer in read.named_buffers():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
        model.generation_config = read.generation_config
    return model.eval().requires_grad_(False), tokenizer


def _activation_name(hidden_act: str) -> str:
    if hidden_act not in ACTIVATION_NAMES:
        raise UnsupportedModel(f"activation {hidden_act!r} is not known; known: {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[hidden_act]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface, answered by the plan handed to the attention module."""
    return kwargs["packed_plan"](module.layer_idx, query, key, value, scaling), None


def _find(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


def _get(module: nn.Module, path: str) -> Any:
    found = _find(module, path)
    if found is None:
        raise UnsupportedModel(f"{type(module).__name__} has no part {path!r}")
    return found
