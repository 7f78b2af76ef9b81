"""One interface to the models of all families (:mod:`fastedit.model.families`).

A forward pass is: embed -> per layer (mix, feed-forward) -> final norm -> head. It runs on packed rows, see
:mod:`fastedit.model.packed_attention`. The down-projection weight W of each layer is (d_model, d_ff).

A model may be spread over several devices. Rows move to a layer's device before the layer runs, and results are on
`ModelAdapter.device`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastedit.model import lora
from fastedit.model.attention_modules import BY_INTERFACE
from fastedit.model.families import (
    FAMILIES,
    Family,
    UnsupportedModel,
    activation_name,
    check_weights,
    factor,
    find,
    max_positions,
    refuse_wrapped,
    text_config,
)
from fastedit.model.family_search import choose
from fastedit.model.logits import Head, LogitBuffer
from fastedit.model.packed_attention import Plan, Rotary, plan_sequences
from fastedit.ops.capture_keys import activate
from fastedit.runtime.free_memory import is_out_of_memory
from fastedit.runtime.words import told_by

PACKED_ATTENTION = "fastedit_packed"


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint as it lies on the disk.

    place: its folder, hub id or GGUF file
    dtype: of most of its numbers, float32 for a GGUF file; dtypes: tensor name -> dtype, where that is another one
    """

    place: str
    dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]

    def of(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored. One that the files do not name counts as most others."""
        return self.dtypes.get(name, self.dtype)


class Mixed(NamedTuple):
    """A decoder layer after its attention, (n_rows, d_model) each.

    residual: the stream to which the feed-forward is added; ffn_input: what the feed-forward reads
    """

    residual: Tensor
    ffn_input: Tensor


class ModelAdapter:
    """A causal language model and its tokenizer, with the same interface for every family.

    model: a transformers causal language model, whose weights are edited in place, or PEFT's `PeftModel` around one
        with LoRA adapters: its base weights are edited, with the adapters on (:mod:`fastedit.model.lora`)
    tokenizer: its fast tokenizer, since character offsets are needed
    families: the rows to choose from; the first that fits is taken. For another family put a row of your own in front
    Raises UnsupportedModel if no row fits, if the model is quantised or has offloaded weights, if the tokenizer is not
    a fast one, or if the model is wrapped otherwise, has other adapters, or has no head.
    """

    def __init__(self, model: Any, tokenizer: Any, families: Sequence[Family] = FAMILIES) -> None:
        # What was handed over: the model, or the wrapper around it.
        self.given = model
        model = lora.unwrapped(model)
        refuse_wrapped(model)
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedModel(f"{type(tokenizer).__name__}: a fast tokenizer with character offsets is needed")

        self.model = model
        self.tokenizer = tokenizer
        # Held while passes run or weights are written, so that threads take turns.
        self.lock = threading.RLock()
        # Where the model was loaded from, for reports; None for a model that the caller loaded.
        self.source: str | None = None
        # The files behind the source, and the dtypes in them.
        self.stored: StoredModel | None = None

        self.family = choose(model, families)
        self.layers: nn.ModuleList = find(model, self.family.layers)
        check_weights(model, self.family, self.layers)

        config = text_config(model)
        kinds = getattr(config, "layer_types", None) if _rotates_by_kind(model, self.family) else None
        self._layers = [
            _LayerParts.of(self.family, layer, "" if kinds is None else kinds[i]) for i, layer in enumerate(self.layers)
        ]

        self.d_model, self.d_ff = (int(size) for size in self.down_weight(0).shape)
        self.n_layers = len(self.layers)
        self.activation_name = activation_name(config, self.family.activation)
        self.max_positions = max_positions(config, self.family.n_positions)
        self._embedding_factor = factor(config, self.family.embedding_factor)
        self._residual_factor = factor(config, self.family.residual_factor)
        self._logit_factor = factor(config, self.family.logit_factor)

    def __repr__(self) -> str:
        return (
            f"ModelAdapter({type(self.model).__name__}, layers={self.n_layers}, d_model={self.d_model},"
            f" d_ff={self.d_ff}, dtype={str(self.dtype).removeprefix('torch.')}, device={self.device},"
            f" source={self.source!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """All but the lock: a copy gets one of its own."""
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.lock = threading.RLock()

    @property
    def device(self) -> torch.device:
        """Device of the embedding: token ids have to be there, and keys, hidden states and logits are."""
        return find(self.model, self.family.embedding).weight.device

    @property
    def n_embeddings(self) -> int:
        """Rows of the embedding: the model knows the token ids below it."""
        return int(find(self.model, self.family.embedding).weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the hidden states, which is that of the last layer's weights."""
        return self.down_parameter(self.n_layers - 1).dtype

    @property
    def text_config(self) -> Any:
        """transformers' config of the text decoder."""
        return text_config(self.model)

    @property
    def post_norm(self) -> bool:
        """Whether a norm follows the down-projection.

        The hidden state after the layer is then not linear in W, and a value is optimised for the down-projection's
        output instead (see :mod:`fastedit.model.post_norm`)."""
        return self.family.post_norm

    @property
    def shares_a_value(self) -> bool:
        """Whether several layers can be edited towards one value: at most one norm stands behind each."""
        return self.family.ffn_out_norm is None or self.family.output_norm is None

    @property
    def value_gain(self) -> float:
        """What a change of the down-projection's output is multiplied by where it becomes a change of the value."""
        return 1.0 if self.post_norm else self._residual_factor

    @property
    def head(self) -> Head:
        """The unembedding. Its weight is a view of the model's; a factor of the logits is in `final_norm`."""
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        softcap = getattr(text_config(self.model), "final_logit_softcapping", None)

        return Head(head.weight.detach(), None if bias is None else bias.detach(), softcap)

    def unembedding(self, tokens: Tensor) -> Tensor:
        """Directions of token ids (n,) in the residual stream, (n, d_model): rows of the head's weight, on `device`."""
        weight = self.model.get_output_embeddings().weight.detach()
        rows = weight[tokens.to(weight.device)]

        if (project := _optional(self.model, self.family.project_out)) is not None:
            rows = rows.to(project.weight.device) @ project.weight.detach()

        return _times(rows, self._logit_factor).to(self.device)

    def token_embedding(self, tokens: Tensor) -> Tensor:
        """Input embeddings of token ids (n,) without positions, (n, d_model)."""
        embedding = find(self.model, self.family.embedding)
        rows = self._embedded(tokens.to(embedding.weight.device)).detach()

        if (project := _optional(self.model, self.family.project_in)) is not None:
            rows = project(_on_device_of(rows, project)).detach()

        return rows

    def upper_copy(self, first: int, dtype: torch.dtype) -> ModelAdapter:
        """An adapter whose layers from `first` on, final norm and head are copies in `dtype`; lower layers are shared.

        For passes through the layers above the value layer. Rotary tables are still computed in float32."""
        shared = [self.model.config, text_config(self.model), *self.layers[:first]]
        upper = ModelAdapter(
            copy.deepcopy(self.given, {id(part): part for part in shared}), self.tokenizer, (self.family,)
        )

        behind_layers = [_optional(upper.model, path) for path in (self.family.final_norm, self.family.project_out)]
        for part in (*upper.layers[first:], *behind_layers, upper.model.get_output_embeddings()):
            if part is not None:
                # `packed` does this for the model alone, and a model in training mode would drop rows in its copy.
                part.to(dtype).eval().requires_grad_(False)

        # The config is shared, and with it what packed passes change.
        upper.lock = self.lock

        return upper

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise ValueError for several layers that cannot be edited towards one value: two norms stand behind each."""
        family = self.family
        if len(layers) > 1 and not self.shares_a_value:
            raise ValueError(
                f"layers: {family.name} has norms at {family.ffn_out_norm} and at {family.output_norm}, and a value can"
                f" be carried back through one of them: wanted one layer, got {list(layers)}"
            )

    def layer_device(self, layer: int) -> torch.device:
        """Device of a layer's down-projection."""
        return self._layers[layer].device

    def down_parameter(self, layer: int) -> nn.Parameter:
        """The parameter behind `down_weight(layer)`, as the model stores it."""
        return self._layers[layer].down.weight

    def down_weight(self, layer: int) -> Tensor:
        """The down-projection weight W of a layer, (d_model, d_ff). A view, transposed for some families."""
        return self.oriented(layer, self.down_parameter(layer).detach())

    def oriented(self, layer: int, stored: Tensor) -> Tensor:
        """A tensor in the layout of `down_parameter(layer)` as a (d_model, d_ff) view, and the other way around."""
        return stored.T if self._layers[layer].transposed else stored

    def output_weight(self, layer: int) -> Tensor:
        """What the down-projection of a layer multiplies keys with, (d_model, d_ff): W, and on it what adapters add."""
        added = lora.added(self._layers[layer].down)
        weight = self.down_weight(layer)

        return weight if added is None else weight + self.oriented(layer, added.detach()).to(weight.dtype)

    def state(self) -> dict[str, Tensor]:
        """The model's state dict without what adapters have in it, under the names of a model without them."""
        named = dict(self.model.state_dict())
        if not self.has_adapters:
            return named

        return {stored: part for name, part in named.items() if (stored := lora.stored_name(name)) is not None}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by the names that `state` has."""
        named = dict(self.model.named_parameters())
        if not self.has_adapters:
            return named

        return {stored: part for name, part in named.items() if (stored := lora.stored_name(name)) is not None}

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA adapters of PEFT are on the model."""
        return self.given is not self.model

    def weight_name(self, layer: int) -> str:
        """Full parameter name of `down_parameter(layer)` in `state`."""
        return f"{self.family.layers}.{layer}.{self.family.down}.weight"

    @contextlib.contextmanager
    def packed(self) -> Iterator[None]:
        """Prepare the model for packed rows: packed attention, evaluation mode, frozen weights. Restored on exit.

        Other threads wait."""
        with self.lock, self._prepared():
            yield

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        """As `packed`, for a thread that holds the lock."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, _attend)
        config = self._layers[0].attention.config if self.family.attend in BY_INTERFACE else None
        implementation = getattr(config, "_attn_implementation", None)

        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)

        try:
            if config is not None:
                config._attn_implementation = PACKED_ATTENTION
            with self._evaluating():
                yield
        finally:
            if config is not None:
                config._attn_implementation = implementation
            for parameter in trainable:
                parameter.requires_grad_(True)

    def weights_hash(self, layer: int) -> str:
        """SHA-256 over the embeddings and the layers up to `layer`, on which keys of that layer depend, hexadecimal."""
        digest = hashlib.sha256()
        paths = (self.family.embedding, self.family.embedding_norm, self.family.positions, self.family.project_in)
        embeddings = [part for path in paths if (part := _optional(self.model, path)) is not None]

        for module in (*embeddings, *self.layers[: layer + 1]):
            digest.update(lora.describe(module).encode())
            for name, parameter in module.named_parameters():
                digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
                digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())

        return digest.hexdigest()

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Rows that enter layer 0, (n_rows, d_model), of token ids (n_rows,) at positions (n_rows,)."""
        rows = self._embedded(token_ids)

        if (project := _optional(self.model, self.family.project_in)) is not None:
            rows = project(_on_device_of(rows, project))

        if (learned := _optional(self.model, self.family.positions)) is not None:
            # OPT's first positions are for padding.
            index = positions.to(learned.weight.device) + getattr(learned, "offset", 0)
            rows = rows + nn.functional.embedding(index, learned.weight).to(rows.device)

        return rows

    def _embedded(self, token_ids: Tensor) -> Tensor:
        """Rows of the token embedding, times its factor, behind its norm.

        transformers 4 scales those of Gemma 1 and 2 behind the embedding, later releases in it."""
        embedding = find(self.model, self.family.embedding)
        rows = embedding(token_ids)

        config = text_config(self.model)
        if config.model_type in ("gemma", "gemma2") and not hasattr(embedding, "embed_scale"):
            rows = rows * torch.tensor(config.hidden_size**0.5, dtype=rows.dtype)

        rows = _times(rows, self._embedding_factor)
        norm = _optional(self.model, self.family.embedding_norm)

        return rows if norm is None else norm(_on_device_of(rows, norm))

    def rotary(self, positions: Tensor) -> Rotary:
        """Rotary tables for rows at positions (n_rows,)."""
        if self.family.rotary is None:
            return Rotary({})

        if (local := _local_rotary(self.model, self.family)) is not None:
            like = torch.empty(0, dtype=self.dtype, device=positions.device)
            parts = {"full_attention": find(self.model, self.family.rotary), "sliding_attention": local}
            return Rotary({kind: part(like, positions[None]) for kind, part in parts.items()})

        return self.family.rotate(find(self.model, self.family.rotary), positions, self.dtype)

    def mix(self, layer: int, rows: Tensor, plan: Plan, rotary: Rotary) -> Mixed:
        """First half of a decoder layer on packed rows (n_rows, d_model): attention, and the norm before the
        feed-forward."""
        parts = self._layers[layer]
        device = parts.device
        rows = rows.to(device)

        attention_input = rows if parts.attention_norm is None else parts.attention_norm(rows)
        attended = self.family.attend(parts.attention, attention_input, plan.to(device), rotary.at(parts.kind, device))
        if parts.attention_out_norm is not None:
            attended = parts.attention_out_norm(attended)

        residual = rows + _times(attended, self._residual_factor)
        if parts.sum_norm is not None:
            residual = parts.sum_norm(residual)

        if parts.ffn_norm is not None:
            return Mixed(residual, parts.ffn_norm(rows if self.family.parallel else residual))

        return Mixed(residual, attention_input if self.family.parallel else residual)

    def gate_up(self, layer: int, ffn_input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gate and up projections of rows (n_rows, d_model), (n_rows, d_ff) each; up is None in a model without it."""
        parts = self._layers[layer]
        gate = parts.gate(ffn_input)

        if parts.up is None:
            return gate, None

        if parts.up is parts.gate:
            return gate.chunk(2, dim=-1)

        return gate, parts.up(ffn_input)

    def neurons(self, layer: int, ffn_input: Tensor) -> Tensor:
        """Keys of rows (n_rows, d_model), (n_rows, d_ff): the input of the down-projection."""
        gate, up = self.gate_up(layer, ffn_input)
        activation = activate(gate, self.activation_name)

        return activation if up is None else activation * up

    def down(self, layer: int, keys: Tensor) -> Tensor:
        """The down-projection's output of keys (n_rows, d_ff), W k and its bias: (n_rows, d_model)."""
        return self._layers[layer].down(keys)

    def ffn_output(self, layer: int, ffn_input: Tensor) -> Tensor:
        """The down-projection's output of rows (n_rows, d_model) that the feed-forward reads: (n_rows, d_model)."""
        return self.down(layer, self.neurons(layer, ffn_input))

    def join(self, layer: int, residual: Tensor, output: Tensor) -> Tensor:
        """End of a decoder layer: the rows that enter the next layer, from the residual stream and the
        down-projection's output, (n_rows, d_model) each."""
        parts = self._layers[layer]
        output = output if parts.ffn_out_norm is None else parts.ffn_out_norm(output)
        rows = residual + _times(output, self._residual_factor)

        return rows if parts.output_norm is None else parts.output_norm(rows)

    def feed_forward(self, layer: int, mixed: Mixed) -> Tensor:
        """Second half of a decoder layer: the rows that enter the next layer, (n_rows, d_model)."""
        return self.join(layer, mixed.residual, self.ffn_output(layer, mixed.ffn_input))

    def feed_forward_with_keys(self, layer: int, mixed: Mixed) -> tuple[Tensor, Tensor]:
        """As `feed_forward`, and with it the keys of all rows, (n_rows, d_ff)."""
        keys = self.neurons(layer, mixed.ffn_input)

        return self.join(layer, mixed.residual, self.down(layer, keys)), keys

    def run(self, rows: Tensor, layers: range, plan: Plan, rotary: Rotary, tail: Tensor | None = None) -> Tensor:
        """Run decoder layers on packed rows (n_rows, d_model) and return the rows after them.

        tail: (n_tail,) int64; the last layer's feed-forward runs on these rows alone, and only they are returned"""
        for layer in layers:
            mixed = self.mix(layer, rows, plan, rotary)
            if tail is not None and layer == layers[-1]:
                tail = tail.to(mixed.residual.device)
                mixed = Mixed(mixed.residual[tail], mixed.ffn_input[tail])
            rows = self.feed_forward(layer, mixed)

        return rows

    def final_norm(self, rows: Tensor) -> Tensor:
        """What the head reads, (n_rows, d_head) on its device, of rows (n_rows, d_model) after the last layer.

        A factor of the logits is in it."""
        if (norm := _optional(self.model, self.family.final_norm)) is not None:
            rows = norm(_on_device_of(rows, norm))

        if (project := _optional(self.model, self.family.project_out)) is not None:
            rows = project(_on_device_of(rows, project))

        return _times(_on_device_of(rows, self.model.get_output_embeddings()), self._logit_factor)

    @torch.no_grad()
    def generate(self, token_ids: Tensor, n_new: int, top_k: int, generator: torch.Generator | None = None) -> Tensor:
        """Continue token ids (n_sequences, length) by exactly n_new tokens, (n_sequences, length + n_new).

        top_k: one of the top_k next tokens is drawn by its probability; 1 is greedy. End-of-text is never drawn
        generator: of the draws, on the head's device; None = torch's global one
        transformers' own loop draws from the whole vocabulary, which took five times as long when it was measured."""
        ids = token_ids
        new = token_ids
        cache = None

        # BLOOM of transformers 4 refuses what it does not know.
        takes = inspect.signature(self.model.forward).parameters
        options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

        with self.lock, self._evaluating():
            for _ in range(n_new):
                output = self.model(input_ids=new, past_key_values=cache, use_cache=True, **options)
                cache = output.past_key_values
                logits = output.logits[:, -1].float()

                new = self._draw(logits, top_k, generator).to(ids.device)
                ids = torch.cat([ids, new], dim=1)

        return ids

    def _draw(self, logits: Tensor, top_k: int, generator: torch.Generator | None) -> Tensor:
        """One of the top_k tokens per row of logits (n, n_vocabulary), (n, 1) int64. Writes into the logits."""
        if self.tokenizer.eos_token_id is not None:
            logits[:, self.tokenizer.eos_token_id] = -torch.inf

        scores, tokens = logits.topk(min(top_k, logits.shape[1]), dim=1)
        probabilities = torch.softmax(scores, dim=1)
        drawn = (
            torch.multinomial(probabilities, 1, generator=generator) if top_k > 1 else scores.argmax(1, keepdim=True)
        )

        return tokens.gather(1, drawn)

    def check_forward(self, tolerance: float = 1e-3) -> None:
        """Compare packed logits with the model's own on a short text; raise UnsupportedModel if they differ.

        This detects differences that the structure does not show, such as a factor between two parts. An exception of
        the forward is raised as UnsupportedModel too, lack of memory apart, and so is a weight that is not finite.
        tolerance: of the largest difference, relative to the largest logit; 50 times as much in half precision"""
        self._check_finite()
        n_tokens = min(12, self.max_positions)
        positions = torch.arange(n_tokens, device=self.device)
        ids = positions * 7 % self.head.weight.shape[0]

        with torch.no_grad():
            with self._naming_failures("its own forward fails"), self._evaluating():
                expected = self.model(input_ids=ids[None]).logits[0].float()
            if not bool(expected.isfinite().all()):
                raise UnsupportedModel(self._why_not_finite(ids))

            with self._naming_failures(f"it looks like family {self.family.name!r}, but cannot be run as that"):
                packed = self._packed_logits(ids, positions).to(expected.device)

        scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        error = float((packed - expected).abs().max() / scale)
        bound = tolerance if self.dtype in (torch.float32, torch.float64) else 50 * tolerance
        if not error <= bound:
            raise UnsupportedModel(
                f"{type(self.model).__name__} looks like family {self.family.name!r}, but its forward differs"
                f" (relative error {error:.1e}, allowed {bound:.0e}): it needs a row of its own, or, if it caps its"
                " attention scores, to be loaded with attn_implementation='eager'"
            )

    def _packed_logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits (n, n_vocabulary) of one text of token ids (n,) by packed passes."""
        path = list(range(len(ids)))

        with self.packed():
            plan = plan_sequences([path], [path], len(ids))
            rows = self.embed(ids, positions)
            rows = self.final_norm(self.run(rows, range(self.n_layers), plan, self.rotary(positions)))

            return LogitBuffer().logits(rows, self.head)

    @contextlib.contextmanager
    def _naming_failures(self, what: str) -> Iterator[None]:
        """Raise any exception inside the block, lack of memory apart, as UnsupportedModel with it as the cause."""
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                raise
            cause = f"{type(error).__name__}: {told_by(error)}"
            raise UnsupportedModel(f"{type(self.model).__name__}: {what} ({cause})") from error

    def _check_finite(self) -> None:
        """Raise UnsupportedModel for a weight that is not finite, which no logit of a short text may show."""
        for name, parameter in self.model.named_parameters():
            weight = parameter.detach()
            # One pass without a copy; NaN is both the least and the largest number.
            if weight.numel() == 0 or bool(torch.stack(torch.aminmax(weight)).isfinite().all()):
                continue

            n_wrong = int((~weight.isfinite()).sum())
            advice = "get the checkpoint anew" + (f", or {self._remedy()}" if _is_half(weight) else "")
            raise UnsupportedModel(
                f"{type(self.model).__name__}: {name} holds {n_wrong} numbers that are not finite (NaN or infinity);"
                f" {advice}"
            )

    def _remedy(self) -> str:
        """What to do with a model that overflows in half precision."""
        return "load it in float32" if self.dtype == torch.bfloat16 else "load it in bfloat16 or float32"

    def _why_not_finite(self, ids: Tensor) -> str:
        """Why the model's own logits of a text of token ids (n,) are not finite, and what to do."""
        half = _is_half(self.down_parameter(self.n_layers - 1))
        dtype = str(self.dtype).removeprefix("torch.")
        advice = self._remedy() if half else "its weights are too large"
        place = self._first_overflow(ids)

        return (
            f"{type(self.model).__name__}: its weights are finite, but in {dtype} its logits are not, first in {place};"
            f" {advice}"
        )

    def _first_overflow(self, ids: Tensor) -> str:
        """The module whose output is the first that is not finite, for a text of token ids (n,)."""
        names: list[str] = []

        def watch(name: str) -> Any:
            def look(module: nn.Module, inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                    names.append(name)

            return look

        hooks = [module.register_forward_hook(watch(name)) for name, module in self.model.named_modules()]
        try:
            with self._evaluating():
                self.model(input_ids=ids[None])
        finally:
            for hook in hooks:
                hook.remove()

        return names[0] if names else "its head"

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode, without dropout, inside the block; every module returns to its mode afterwards."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()

        try:
            yield
        finally:
            for module in training:
                module.training = True


@dataclass(frozen=True)
class _LayerParts:
    """The parts of one decoder layer; see the fields of `Family`, None for a part that the family does not have.

    kind: the type of the layer, which selects its rotary table; transposed: whether the weight is stored as W^T
    """

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
    def of(cls, family: Family, layer: nn.Module, kind: str) -> _LayerParts:
        """The parts of a decoder layer of the family."""
        from transformers.pytorch_utils import Conv1D

        parts = {field.name: _optional(layer, getattr(family, field.name)) for field in fields(cls)[2:]}

        return cls(kind, isinstance(lora.without(parts["down"]), Conv1D), **parts)

    @property
    def device(self) -> torch.device:
        """Device of the down-projection."""
        return self.down.weight.device


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: runs the plan that `attend_by_interface` passes to the attention module.

    scaling: None, as GPT-2 of transformers 4 calls it, is that of torch's attention"""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5

    return kwargs["packed_plan"](module.layer_idx, query, key, value, scaling, softcap), None


def _rotates_by_kind(model: Any, family: Family) -> bool:
    """Whether the rotary embedding has a table per type of layer."""
    return hasattr(_optional(model, family.rotary), "layer_types") or _local_rotary(model, family) is not None


def _local_rotary(model: Any, family: Family) -> Any:
    """The rotary embedding of Gemma 3's layers with a sliding window, which transformers 4 keeps beside the other."""
    return None if family.rotary is None else find(model, f"{family.rotary}_local")


def _is_half(weight: Tensor) -> bool:
    return weight.dtype in (torch.bfloat16, torch.float16)


def _times(rows: Tensor, number: float) -> Tensor:
    """The rows times a number; the rows themselves for 1."""
    return rows if number == 1 else rows * number


def _optional(module: Any, path: str | None) -> Any:
    """The part at a path; None without a path or a part."""
    return None if path is None else find(module, path)


def _on_device_of(rows: Tensor, module: nn.Module) -> Tensor:
    """The rows on the device of a module's parameters, or as they are if it has none."""
    parameter = next(module.parameters(), None)

    return rows if parameter is None else rows.to(parameter.device)
