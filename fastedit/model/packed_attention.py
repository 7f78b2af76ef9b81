"""Attention over packed rows: the tokens of many sequences are the rows of one (n_rows, d) matrix, without padding.

Linear layers then multiply real tokens only. Attention alone is padded, inside its batched products. An
:class:`AttentionPlan` says which rows form a sequence, and which *prefix* keys and values, computed once and constant
afterwards, come before them.

    attention = softmax(cap(q k^T * scale) + mask) v

causal, with grouped key/value heads. cap(s) = c tanh(s / c) in models that cap their scores at c, else cap(s) = s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class AttentionPlan:
    """Which packed rows attend to which.

    query_index: (n_sequences, query_len) int64, row of each query; padding repeats a row
    output_index: (n_rows,) int64, position of each row's result in the flattened (n_sequences * query_len) grid
    key_index: (n_sequences, key_len) int64, rows attended to; the same object as query_index in a live plan
    mask: (n_sequences, query_len, prefix_len + key_len) bool, True where a query sees a key
    prefix: layer -> (keys, values), each (n_kv_heads * n_sequences, prefix_len, head_dim), head-major
    keep: if not None, every layer that runs stores its (keys, values) here, each (n_kv_heads, n_rows, head_dim)
    The tensors in prefix and keep are on the device of their layer, all others on one device, see `to`.
    """

    query_index: Tensor
    output_index: Tensor
    key_index: Tensor
    mask: Tensor
    prefix: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    keep: dict[int, tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        self._bias: dict[torch.dtype, Tensor] = {}
        self._moved: dict[torch.device, AttentionPlan] = {}

    def bias(self, dtype: torch.dtype) -> Tensor:
        """The mask as 0 / lowest finite value, (1, n_sequences, 1, query_len, prefix_len + key_len)."""
        if dtype not in self._bias:
            bias = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            bias.masked_fill_(~self.mask, torch.finfo(dtype).min)

            self._bias[dtype] = bias[None, :, None]

        return self._bias[dtype]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None = None
    ) -> Tensor:
        """The attention of all rows at one layer, (1, n_rows, n_heads, head_dim).

        query: (1, n_heads, n_rows, head_dim); key, value: (1, n_kv_heads, n_rows, head_dim)
        softcap: the bound c of the scores, or None
        Differentiable in query, key and value if the plan is live (key_index is query_index). For another plan the
        backward pass raises RuntimeError.
        """
        if self.keep is not None:
            self.keep[layer] = (key[0], value[0])

        prefix = self.prefix.get(layer)

        return _PackedAttention.apply(query, key, value, self, prefix, scale, softcap)  # type: ignore[no-untyped-call]

    def collecting(self, keep: dict[int, tuple[Tensor, Tensor]]) -> AttentionPlan:
        """The same plan, which stores keys and values in `keep`."""
        return replace(self, keep=keep)

    def to(self, device: torch.device) -> AttentionPlan:
        """The plan with its indices and mask on `device`, copied once per device; prefix and keep are shared."""
        device = torch.device(device)
        if self.query_index.device == device:
            return self

        if device not in self._moved:
            query_index = self.query_index.to(device)
            self._moved[device] = AttentionPlan(
                query_index=query_index,
                output_index=self.output_index.to(device),
                key_index=query_index if self.key_index is self.query_index else self.key_index.to(device),
                mask=self.mask.to(device),
                prefix=self.prefix,
                keep=self.keep,
            )

        return self._moved[device]


@dataclass(frozen=True)
class CausalPlan:
    """Whole sequences of one length, one after the other: sequence s has the rows from s * length on."""

    length: int

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None = None
    ) -> Tensor:
        """As `AttentionPlan.__call__`."""
        query, key, value = (
            part[0].view(part.shape[1], -1, self.length, part.shape[3]).transpose(0, 1) for part in (query, key, value)
        )

        if softcap is None:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        else:
            mixed = _capped_attention(query, key, value, scale, softcap)

        return mixed.transpose(1, 2).flatten(0, 1)[None]

    def to(self, device: torch.device) -> CausalPlan:
        """The plan itself, which holds no tensor."""
        return self


Plan = AttentionPlan | CausalPlan


# (cosine, sine), each (1, n_rows, rotary_dim); or of a model with ALiBi (bias,), (1, n_rows, n_heads).
Table = tuple[Tensor, ...]


class Rotary:
    """Cosines and sines of the packed rows' positions, or ALiBi's biases, by type of layer.

    tables: layer type -> its `Table`; empty for a model whose attention reads no positions
    """

    def __init__(self, tables: Mapping[str, Table]) -> None:
        self._tables = tables
        self._placed: dict[tuple[str, torch.device], Table] = {}

    def at(self, kind: str, device: torch.device) -> Table | None:
        """The table for layers of type `kind`, on `device`; None for a model whose attention reads no positions."""
        if not self._tables:
            return None

        key = (kind, device)
        if key not in self._placed:
            self._placed[key] = tuple(part.to(device) for part in self._tables[kind])

        return self._placed[key]


def plan_sequences(owned: Sequence[Sequence[int]], paths: Sequence[Sequence[int]], n_rows: int) -> AttentionPlan:
    """Plan for the rows of a prefix tree.

    paths[s]: the rows of sequence s from its start
    owned[s]: the last of them, which sequence s computes; each row is owned by exactly one sequence"""
    # A sequence whose rows are all owned by others asks no query.
    asking = [s for s in range(len(paths)) if owned[s]]
    query_len = max(len(owned[s]) for s in asking)
    key_len = max(len(paths[s]) for s in asking)

    query_index = torch.zeros(len(asking), query_len, dtype=torch.int64)
    key_index = torch.zeros(len(asking), key_len, dtype=torch.int64)
    output_index = torch.zeros(n_rows, dtype=torch.int64)
    last_seen = torch.zeros(len(asking), query_len, dtype=torch.int64)

    for i, s in enumerate(asking):
        n_query = len(owned[s])
        n_key = len(paths[s])
        rows = torch.tensor(owned[s])

        query_index[i, :n_query] = rows
        key_index[i, :n_key] = torch.tensor(paths[s])
        output_index[rows] = i * query_len + torch.arange(n_query)
        last_seen[i, :n_query] = torch.arange(n_key - n_query, n_key)

    mask = torch.arange(key_len)[None, None] <= last_seen[:, :, None]

    return AttentionPlan(query_index, output_index, key_index, mask)


def plan_live(
    lengths: Sequence[int],
    prefix_lengths: Sequence[int],
    prefix: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> AttentionPlan:
    """Plan for live rows: sequence s has lengths[s] consecutive rows and sees prefix_lengths[s] prefix keys.

    Its rows attend to all its prefix keys, and to each other causally.
    prefix: as in `AttentionPlan`; each sequence's keys come first, then padding up to the longest prefix"""
    width = max(lengths)
    length = torch.tensor(lengths)
    start = length.cumsum(0) - length
    step = torch.arange(width)

    is_row = step[None] < length[:, None]
    query_index = torch.where(is_row, start[:, None] + step[None], start[:, None])
    output_index = torch.tensor([s * width + i for s, count in enumerate(lengths) for i in range(count)])

    sees_prefix = torch.arange(max(prefix_lengths))[None] < torch.tensor(prefix_lengths)[:, None]
    sees_row = step[None, :] <= step[:, None]
    mask = torch.cat(
        [sees_prefix[:, None].expand(-1, width, -1), sees_row[None].expand(len(lengths), -1, -1)],
        dim=2,
    )

    return AttentionPlan(query_index, output_index, query_index, mask, prefix or {})


def _capped_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float) -> Tensor:
    """Causal attention with capped scores, which torch lacks. All are (n_sequences, heads, length, head_dim)."""
    queries_per_key = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(queries_per_key, 1)
    value = value.repeat_interleave(queries_per_key, 1)

    scores = (query @ key.transpose(2, 3)).mul_(scale / softcap).tanh_().mul_(softcap)
    length = query.shape[2]
    is_later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu_(1)
    scores.masked_fill_(is_later, torch.finfo(scores.dtype).min)

    return _softmax(scores) @ value


def _softmax(scores: Tensor) -> Tensor:
    """softmax over the last dimension, computed in float32 at least and returned in the dtype of the scores."""
    working = torch.promote_types(scores.dtype, torch.float32)

    return torch.softmax(scores, dim=-1, dtype=working).to(scores.dtype)


class _PackedAttention(torch.autograd.Function):
    """Attention and its gradient as batched products over (kv head, sequence) pairs.

    torch's fused attention takes three times as long here, for a few queries and about twenty keys per sequence."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: AttentionPlan,
        prefix: tuple[Tensor, Tensor] | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        n_heads, n_kv, head_dim = query.shape[1], key.shape[1], query.shape[3]
        n_seq, query_len = plan.query_index.shape

        queries = _gather_queries(query[0], plan, n_kv)
        keys = key[0].index_select(1, plan.key_index.flatten()).view(n_kv * n_seq, -1, head_dim)
        values = value[0].index_select(1, plan.key_index.flatten()).view(n_kv * n_seq, -1, head_dim)

        scores = torch.bmm(queries, keys.transpose(1, 2))
        if prefix is not None:
            scores = torch.cat([torch.bmm(queries, prefix[0].transpose(1, 2)), scores], dim=2)

        # tanh(s / c), which the gradient needs.
        capped = None
        if softcap is None:
            scores.mul_(scale)
        else:
            capped = scores.mul_(scale / softcap).tanh_()
            scores = capped * softcap

        scores.view(n_kv, n_seq, n_heads // n_kv, query_len, -1).add_(plan.bias(scores.dtype))
        weights = _softmax(scores)

        n_prefix = 0 if prefix is None else prefix[0].shape[1]
        mixed = torch.bmm(weights[:, :, n_prefix:], values)
        if prefix is not None:
            mixed.baddbmm_(weights[:, :, :n_prefix], prefix[1])

        ctx.save_for_backward(queries, keys, values, weights, capped)
        ctx.plan = plan
        ctx.prefix = prefix
        ctx.scale = scale

        grid = mixed.view(n_kv, n_seq, n_heads // n_kv, query_len, head_dim).permute(1, 3, 0, 2, 4)
        rows = grid.reshape(n_seq * query_len, n_heads, head_dim).index_select(0, plan.output_index)

        return rows[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: AttentionPlan = ctx.plan
        prefix: tuple[Tensor, Tensor] | None = ctx.prefix
        if plan.key_index is not plan.query_index:
            raise RuntimeError("packed attention: gradients need a live plan (queries and keys are the same rows)")

        queries, keys, values, weights, capped = ctx.saved_tensors
        grad = grads[0][0]
        n_heads, head_dim = grad.shape[1:]
        n_seq, query_len = plan.query_index.shape
        n_kv = keys.shape[0] // n_seq
        n_prefix = 0 if prefix is None else prefix[0].shape[1]

        padded = grad.new_zeros(n_seq * query_len, n_heads, head_dim).index_copy_(0, plan.output_index, grad)
        padded = padded.view(n_seq, query_len, n_kv, n_heads // n_kv, head_dim).permute(2, 0, 3, 1, 4)
        grad_mixed = padded.reshape(n_kv * n_seq, -1, head_dim)

        grad_weights = torch.bmm(grad_mixed, values.transpose(1, 2))
        if prefix is not None:
            prefix_part = torch.bmm(grad_mixed, prefix[1].transpose(1, 2))
            grad_weights = torch.cat([prefix_part, grad_weights], dim=2)
        grad_values = torch.bmm(weights[:, :, n_prefix:].transpose(1, 2), grad_mixed)

        inner = (grad_weights * weights).sum(-1, keepdim=True)
        grad_scores = (grad_weights - inner).mul_(weights).mul_(ctx.scale)
        if capped is not None:
            grad_scores.mul_(1 - capped.square())

        grad_queries = torch.bmm(grad_scores[:, :, n_prefix:], keys)
        if prefix is not None:
            grad_queries.baddbmm_(grad_scores[:, :, :n_prefix], prefix[0])
        grad_keys = torch.bmm(grad_scores[:, :, n_prefix:].transpose(1, 2), queries)

        grid = grad_queries.view(n_kv, n_seq, n_heads // n_kv, query_len, head_dim).transpose(1, 2)
        grad_query = grid.reshape(n_heads, -1, head_dim).index_select(1, plan.output_index)
        grad_key = grad_keys.view(n_kv, -1, head_dim).index_select(1, plan.output_index)
        grad_value = grad_values.view(n_kv, -1, head_dim).index_select(1, plan.output_index)

        return grad_query[None], grad_key[None], grad_value[None], None, None, None, None


def _gather_queries(query: Tensor, plan: AttentionPlan, n_kv: int) -> Tensor:
    """(n_heads, n_rows, head_dim) -> (n_kv * n_sequences, heads_per_kv * query_len, head_dim)."""
    n_heads, _, head_dim = query.shape
    n_seq, query_len = plan.query_index.shape

    rows = query.index_select(1, plan.query_index.flatten())
    grid = rows.view(n_kv, n_heads // n_kv, n_seq, query_len, head_dim).transpose(1, 2)

    return grid.reshape(n_kv * n_seq, -1, head_dim)
