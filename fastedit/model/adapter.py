"""A model seen through its family's row (:mod:`fastedit.model.families`), the same for every family.

Everything above this module sees: embed -> per layer (mix, feed-forward) -> final norm -> head, on packed rows (see
`packed_attention`), with the down-projection weight W of every layer as (d_model, d_ff). Parts may lie on
several devices: rows go to a layer's device before it runs, and what leaves a pass is on `ModelAdapter.device`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastedit.model.families import (
    FAMILIES,
    Family,
    UnsupportedModel,
    activation_name,
    attend_by_interface,
    check_weights,
    choose,
    find,
    max_positions,
    text_config,
)
from fastedit.model.logits import Head, LogitBuffer
from fastedit.model.packed_attention import Plan, Rotary, plan_sequences
from fastedit.ops.capture_keys import activate

PACKED_ATTENTION = "fastedit_packed"


class Mixed(NamedTuple):
    """A decoder layer after its attention, each (n_rows, d_model): what the feed-forward is added to, and reads."""

    residual: Tensor
    ffn_input: Tensor


class ModelAdapter:
    """A causal language model and its tokenizer, seen through its family's row.

    model: a transformers causal language model; its weights are the ones edited
    tokenizer: the matching fast tokenizer (character offsets are needed)
    families: the rows to choose from, the first that fits; put a row of your own in front for another family
    Raises UnsupportedModel when no row fits, and for a model that is quantised or has offloaded weights.
    """

    def __init__(self, model: Any, tokenizer: Any, families: Sequence[Family] = FAMILIES) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedModel(f"{type(tokenizer).__name__}: a fast tokenizer with character offsets is needed")
        self.model = model
        self.tokenizer = tokenizer
        # Where it was loaded from, for reports; None for a model that was handed over.
        self.source: str | None = None
        self.family = choose(model, families)
        self.layers: nn.ModuleList = find(model, self.family.layers)
        check_weights(model, self.family, self.layers)
        config = text_config(model)
        kinds = getattr(config, "layer_types", None) if _rotates_by_kind(model, self.family) else None
        self._layers = [
            _Layer.of(self.family, layer, "" if kinds is None else kinds[i]) for i, layer in enumerate(self.layers)
        ]
        self.d_model, self.d_ff = (int(size) for size in self.down_weight(0).shape)
        self.n_layers = len(self.layers)
        self.activation_name = activation_name(config, self.family.activation)
        self.max_positions = max_positions(config)

    @property
    def device(self) -> torch.device:
        """Device of the embedding: where token ids go, and where keys, hidden states and logits come from."""
        return find(self.model, self.family.embedding).weight.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the hidden states: that of the last layer's weights."""
        return self.down_parameter(self.n_layers - 1).dtype

    @property
    def post_norm(self) -> bool:
        """True when a norm stands behind the down-projection. A value is then wanted of the down-projection's output,
        not of the hidden state after the layer, which is no longer linear in the weight."""
        return self.family.post_norm

    @property
    def head(self) -> Head:
        """The unembedding."""
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        softcap = getattr(text_config(self.model), "final_logit_softcapping", None)
        return Head(head.weight.detach(), None if bias is None else bias.detach(), softcap)

    def unembedding(self, tokens: Tensor) -> Tensor:
        """Directions of tokens (n,) in the residual stream, (n, d_model): rows of the head, on `device`."""
        rows = self.model.get_output_embeddings().weight.detach()
        rows = rows[tokens.to(rows.device)]
        if (project := _optional(self.model, self.family.project_out)) is not None:
            rows = rows.to(project.weight.device) @ project.weight.detach()
        return rows.to(self.device)

    def token_embedding(self, tokens: Tensor) -> Tensor:
        """Input embeddings of tokens (n,) without positions, (n, d_model)."""
        embedding = find(self.model, self.family.embedding)
        rows = embedding(tokens.to(embedding.weight.device)).detach()
        if (project := _optional(self.model, self.family.project_in)) is not None:
            rows = project(_beside(rows, project)).detach()
        return rows

    def upper_copy(self, first: int, dtype: torch.dtype) -> ModelAdapter:
        """An adapter whose layers from `first` on, final norm and head are copies in `dtype`; layers below are shared.

        For passes through what lies above the value layer. Rotary tables are made in float32 as before."""
        config = text_config(self.model)
        shared = [self.model.config, config, *self.layers[:first]]
        twin = copy.deepcopy(self.model, {id(part): part for part in shared})
        upper = [_optional(twin, path) for path in (self.family.final_norm, self.family.project_out)]
        for part in (*find(twin, self.family.layers)[first:], *upper, twin.get_output_embeddings()):
            if part is not None:
                part.to(dtype)
        return ModelAdapter(twin, self.tokenizer, (self.family,))

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise ValueError unless these layers can be written towards one value."""
        if self.post_norm and len(layers) != 1:
            raise ValueError(
                f"layers: {self.family.name} normalises what its feed-forward gives before adding it, so several layers"
                f" cannot share one value: wanted one layer, got {list(layers)}"
            )

    def layer_device(self, layer: int) -> torch.device:
        """Device of a layer's down-projection."""
        return self._layers[layer].device

    def down_parameter(self, layer: int) -> nn.Parameter:
        """The parameter behind `down_weight(layer)`, as the model stores it."""
        return self._layers[layer].down.weight

    def down_weight(self, layer: int) -> Tensor:
        """The down-projection W of a layer, (d_model, d_ff): no copy, and for some families a transposed view."""
        return self.oriented(layer, self.down_parameter(layer).detach())

    def oriented(self, layer: int, stored: Tensor) -> Tensor:
        """View a tensor that lies like the parameter of `down_weight(layer)` as (d_model, d_ff), and the other way."""
        return stored.T if self._layers[layer].transposed else stored

    def weight_name(self, layer: int) -> str:
        """Full parameter name of `down_parameter(layer)` in the model's state dict."""
        return f"{self.family.layers}.{layer}.{self.family.down}.weight"

    @contextlib.contextmanager
    def packed(self) -> Iterator[None]:
        """Prepare the model for packed rows: own attention core, eval mode, frozen weights. All restored on exit."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, _attend)
        config = self._layers[0].attention.config if self.family.attend is attend_by_interface else None
        before = getattr(config, "_attn_implementation", None)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            if config is not None:
                config._attn_implementation = PACKED_ATTENTION
            with self._evaluating():
                yield
        finally:
            if config is not None:
                config._attn_implementation = before
            for parameter in learning:
                parameter.requires_grad_(True)

    def weights_hash(self, layer: int) -> str:
        """SHA-256 over the embeddings and all layers up to `layer`: everything that keys there depend on."""
        digest = hashlib.sha256()
        paths = (self.family.embedding, self.family.positions, self.family.project_in)
        entry = [part for path in paths if (part := _optional(self.model, path)) is not None]
        for module in (*entry, *self.layers[: layer + 1]):
            for name, parameter in module.named_parameters():
                digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
                digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """(n_rows,) token ids and their positions -> (n_rows, d_model) rows entering layer 0."""
        rows = find(self.model, self.family.embedding)(token_ids)
        if (project := _optional(self.model, self.family.project_in)) is not None:
            rows = project(_beside(rows, project))
        if (learned := _optional(self.model, self.family.positions)) is not None:
            # OPT keeps its first positions for padding.
            places = positions.to(learned.weight.device) + getattr(learned, "offset", 0)
            rows = rows + nn.functional.embedding(places, learned.weight).to(rows.device)
        return rows

    def rotary(self, positions: Tensor) -> Rotary:
        """Rotary tables for rows at `positions` (n_rows,)."""
        if self.family.rotary is None:
            return Rotary({})
        return self.family.rotate(find(self.model, self.family.rotary), positions, self.dtype)

    def mix(self, layer: int, rows: Tensor, plan: Plan, rotary: Rotary) -> Mixed:
        """First half of a decoder layer on packed rows (n_rows, d_model): attention, and the norm that the
        feed-forward reads."""
        part = self._layers[layer]
        device = part.device
        rows = rows.to(device)
        read = rows if part.attention_norm is None else part.attention_norm(rows)
        mixed = self.family.attend(part.attention, read, plan.to(device), rotary.at(part.kind, device))
        if part.attention_out_norm is not None:
            mixed = part.attention_out_norm(mixed)
        residual = rows + mixed
        if part.sum_norm is not None:
            residual = part.sum_norm(residual)
        if part.ffn_norm is not None:
            return Mixed(residual, part.ffn_norm(rows if self.family.parallel else residual))
        return Mixed(residual, read if self.family.parallel else residual)

    def gate_up(self, layer: int, ffn_input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gate and up projections of (n_rows, d_model) rows, each (n_rows, d_ff); None for up where there is none."""
        part = self._layers[layer]
        gate = part.gate(ffn_input)
        if part.up is None:
            return gate, None
        if part.up is part.gate:
            return gate.chunk(2, dim=-1)
        return gate, part.up(ffn_input)

    def neurons(self, layer: int, ffn_input: Tensor) -> Tensor:
        """Keys of (n_rows, d_model) rows, (n_rows, d_ff): the input of the down-projection."""
        gate, up = self.gate_up(layer, ffn_input)
        active = activate(gate, self.activation_name)
        return active if up is None else active * up

    def down(self, layer: int, keys: Tensor) -> Tensor:
        """The down-projection's output, W k and its bias, of (n_rows, d_ff) keys: (n_rows, d_model)."""
        return self._layers[layer].down(keys)

    def ffn_output(self, layer: int, ffn_input: Tensor) -> Tensor:
        """The down-projection's output of (n_rows, d_model) rows: (n_rows, d_model)."""
        return self.down(layer, self.neurons(layer, ffn_input))

    def join(self, layer: int, residual: Tensor, output: Tensor) -> Tensor:
        """End of a decoder layer: residual and the down-projection's output -> rows entering the next layer, all
        (n_rows, d_model)."""
        part = self._layers[layer]
        rows = residual + (output if part.ffn_out_norm is None else part.ffn_out_norm(output))
        return rows if part.output_norm is None else part.output_norm(rows)

    def feed_forward(self, layer: int, mixed: Mixed) -> Tensor:
        """Second half of a decoder layer: (n_rows, d_model) rows entering the next layer."""
        return self.join(layer, mixed.residual, self.ffn_output(layer, mixed.ffn_input))

    def feed_forward_with_keys(self, layer: int, mixed: Mixed) -> tuple[Tensor, Tensor]:
        """Like `feed_forward`, and the keys of all rows: (n_rows, d_ff), the very input of the down-projection."""
        keys = self.neurons(layer, mixed.ffn_input)
        return self.join(layer, mixed.residual, self.down(layer, keys)), keys

    def run(self, rows: Tensor, layers: range, plan: Plan, rotary: Rotary, tail: Tensor | None = None) -> Tensor:
        """Whole decoder layers on packed rows. With `tail` (row indices) the last layer's feed-forward runs on
        those rows alone and (n_tail, d_model) is returned."""
        for layer in layers:
            mixed = self.mix(layer, rows, plan, rotary)
            if tail is not None and layer == layers[-1]:
                tail = tail.to(mixed.residual.device)
                mixed = Mixed(mixed.residual[tail], mixed.ffn_input[tail])
            rows = self.feed_forward(layer, mixed)
        return rows

    def final_norm(self, rows: Tensor) -> Tensor:
        """From (n_rows, d_model) rows behind the last layer to what the head reads, (n_rows, d_head), on its device."""
        if (norm := _optional(self.model, self.family.final_norm)) is not None:
            rows = norm(_beside(rows, norm))
        if (project := _optional(self.model, self.family.project_out)) is not None:
            rows = project(_beside(rows, project))
        return _beside(rows, self.model.get_output_embeddings())

    @torch.no_grad()
    def generate(self, token_ids: Tensor, n_new: int, top_k: int) -> Tensor:
        """Continue (n_sequences, length) token ids by exactly n_new tokens, (n_sequences, length + n_new).

        top_k = 1 is greedy; otherwise one of the top_k is drawn by its probability. End-of-text never comes. Unlike
        transformers' own loop it draws among top_k numbers and not the whole vocabulary, a fifth of the time here."""
        ids, cache, new = token_ids, None, token_ids
        with self._evaluating():
            for _ in range(n_new):
                out = self.model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, logits = out.past_key_values, out.logits[:, -1].float()
                if self.tokenizer.eos_token_id is not None:
                    logits[:, self.tokenizer.eos_token_id] = -torch.inf
                scores, tokens = logits.topk(min(top_k, logits.shape[1]), dim=1)
                odds = torch.softmax(scores, dim=1)
                drawn = torch.multinomial(odds, 1) if top_k > 1 else scores.argmax(1, keepdim=True)
                new = tokens.gather(1, drawn).to(ids.device)
                ids = torch.cat([ids, new], dim=1)
        return ids

    def check_forward(self, tolerance: float = 1e-3) -> None:
        """Compare packed logits with the model's own on a short text; raise UnsupportedModel when they differ.

        Catches what structure cannot show, such as a factor between two parts. Error is relative to the largest
        logit."""
        n_tokens = min(12, self.max_positions)
        positions = torch.arange(n_tokens, device=self.device)
        ids = positions * 7 % self.head.weight.shape[0]
        with torch.no_grad():
            with self._evaluating():
                expected = self.model(input_ids=ids[None]).logits[0].float()
            with self.packed():
                path = list(range(n_tokens))
                plan = plan_sequences([path], [path], n_tokens)
                rows = self.embed(ids, positions)
                rows = self.final_norm(self.run(rows, range(self.n_layers), plan, self.rotary(positions)))
                found = LogitBuffer().logits(rows, self.head).to(expected.device)
        error = float((found - expected).abs().max() / expected.abs().max())
        bound = tolerance if self.dtype in (torch.float32, torch.float64) else 50 * tolerance
        if not error <= bound:
            raise UnsupportedModel(
                f"{type(self.model).__name__} looks like family {self.family.name!r}, but its forward differs"
                f" (relative error {error:.1e}, allowed {bound:.0e}): it needs a row of its own, or, if it caps its"
                " attention scores, to be loaded with attn_implementation='eager'"
            )

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No dropout inside; every module's mode as it was afterwards."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


@dataclass(frozen=True)
class _Layer:
    """The parts of one decoder layer, found once. kind: the type of layer, for its rotary table."""

    kind: str
    transposed: bool
    attention: Any
    gate: Any
    up: Any
    down: Any
    attention_norm: Any
    attention_out_norm: Any
    sum_norm: Any
    ffn_norm: Any
    ffn_out_norm: Any
    output_norm: Any

    @classmethod
    def of(cls, family: Family, layer: nn.Module, kind: str) -> _Layer:
        from transformers.pytorch_utils import Conv1D

        parts = {field.name: _optional(layer, getattr(family, field.name)) for field in fields(cls)[2:]}
        return cls(kind, isinstance(parts["down"], Conv1D), **parts)

    @property
    def device(self) -> torch.device:
        return self.down.weight.device


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, answered by the plan handed to the attention module."""
    return kwargs["packed_plan"](module.layer_idx, query, key, value, scaling, softcap), None


def _rotates_by_kind(model: Any, family: Family) -> bool:
    return hasattr(_optional(model, family.rotary), "layer_types")


def _optional(module: Any, path: str | None) -> Any:
    return None if path is None else find(module, path)


def _beside(rows: Tensor, module: nn.Module) -> Tensor:
    """The rows on the device of a module's parameters."""
    parameter = next(module.parameters(), None)
    return rows if parameter is None else rows.to(parameter.device)
