"""How the attention modules of the families run on packed rows, and how the tables of their positions are made.

A row of :mod:`fastedit.model.families` names one function that runs an attention module, `Attend`, and one that makes
the tables of the packed rows, `Rotate`. Most families need neither of their own: their attention calls transformers'
attention interface, and a module of the model makes the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastedit.model.packed_attention import Plan, Rotary, Table

Attend = Callable[[Any, Tensor, Plan, Table | None], Tensor]
Rotate = Callable[[Any, Tensor, torch.dtype], Rotary]


def attend_by_interface(module: Any, rows: Tensor, plan: Plan, table: Table | None) -> Tensor:
    """Run an attention module that calls transformers' attention interface, which `ModelAdapter.packed` replaces."""
    return module(hidden_states=rows[None], position_embeddings=table, attention_mask=None, packed_plan=plan)[0][0]


def attend_before_scaling(module: Any, rows: Tensor, plan: Plan, table: Table | None) -> Tensor:
    """As `attend_by_interface`, for an attention that scales its queries by their position, as Ministral 3's does.

    Texts end where the scale would first differ from one (`families.max_positions`), so every position may be 0."""
    zeros = torch.zeros(1, rows.shape[0], dtype=torch.int64, device=rows.device)
    output = module(
        hidden_states=rows[None], position_embeddings=table, attention_mask=None, position_ids=zeros, packed_plan=plan
    )

    return output[0][0]


def attend_in_pairs(module: Any, rows: Tensor, plan: Plan, table: Table | None) -> Tensor:
    """Run GPT-J's attention, which does not call transformers' interface.

    Its rotary embedding turns neighbouring elements together, and its scores are float32.
    Raises ValueError without rotary tables."""
    shape = (1, rows.shape[0], module.num_attention_heads, module.head_dim)
    query, key, value = (
        project(rows).view(shape).transpose(1, 2) for project in (module.q_proj, module.k_proj, module.v_proj)
    )

    return _mix_in_pairs(module, (query, key, value), plan, table, rows.dtype)


def attend_fused_in_pairs(module: Any, rows: Tensor, plan: Plan, table: Table | None) -> Tensor:
    """Run CodeGen's attention: GPT-J's with one projection, whose output holds queries, values and keys, in this order,
    four times, for a quarter of the heads each.

    Raises ValueError without rotary tables."""
    quarters = module.qkv_proj(rows).view(rows.shape[0], 4, 3, -1)
    shape = (1, rows.shape[0], module.num_attention_heads, module.head_dim)
    query, value, key = (quarters[:, :, part].reshape(shape).transpose(1, 2) for part in range(3))

    return _mix_in_pairs(module, (query, key, value), plan, table, rows.dtype)


def attend_unscaled(module: Any, rows: Tensor, plan: Plan, table: Table | None) -> Tensor:
    """Run GPT-Neo's attention, which calls no interface, and whose float32 scores are not scaled."""
    shape = (1, rows.shape[0], module.num_heads, module.head_dim)
    working = torch.promote_types(rows.dtype, torch.float32)
    query, key, value = (
        project(rows).view(shape).transpose(1, 2).to(working)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )

    mixed = plan(module.layer_id, query, key, value, 1.0)

    return module.out_proj(mixed[0].flatten(1).to(rows.dtype))


def attend_fused(module: Any, rows: Tensor, plan: Plan, table: Table | None) -> Tensor:
    """Run Falcon's attention, whose one projection holds groups of queries, each with its key and value behind it.

    Raises ValueError without rotary tables."""
    if table is None:
        raise ValueError("attend_fused: a row that uses it needs rotary tables")

    query, key, value = _split_groups(module.query_key_value(rows), module.num_heads, module.head_dim)
    query, key = (_turn_halves(part, *table) for part in (query, key))
    mixed = plan(module.layer_idx, query, key, value, module.head_dim**-0.5)

    return module.dense(mixed[0].flatten(1))


def attend_fused_with_bias(module: Any, rows: Tensor, plan: Plan, table: Table | None) -> Tensor:
    """Run BLOOM's attention, laid out as Falcon's: scores are q k^T / sqrt(head_dim) plus the bias of the key (ALiBi).

    Raises ValueError without a table of biases."""
    scale = module.head_dim**-0.5
    parts = _split_groups(module.query_key_value(rows), module.num_heads, module.head_dim)
    mixed = _mix_with_bias(module.layer_idx, parts, plan, table, scale, 1 / scale)

    return module.dense(mixed.to(rows.dtype))


def attend_fused_with_scaled_bias(module: Any, rows: Tensor, plan: Plan, table: Table | None) -> Tensor:
    """Run the attention of a Falcon with ALiBi: scores are (q k^T + bias of the key) / sqrt(head_dim).

    Raises ValueError without a table of biases."""
    parts = _split_groups(module.query_key_value(rows), module.num_heads, module.head_dim)
    mixed = _mix_with_bias(module.layer_idx, parts, plan, table, module.head_dim**-0.5, 1.0)

    return module.dense(mixed.to(rows.dtype))


def rotate_by_module(module: Any, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """Rotary tables from a rotary embedding module for positions (n_rows,), one per layer type if it has several.

    One that is cut into sections for images, as Qwen VL's, takes the positions of a text three times."""
    like = torch.empty(0, dtype=dtype, device=positions.device)
    kinds = getattr(module, "layer_types", None)

    config = getattr(module, "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    ids = positions.expand(3, 1, -1) if "mrope_section" in rope else positions[None]

    if kinds is None:
        return Rotary({"": module(like, ids)})

    return Rotary({kind: module(like, ids, kind) for kind in kinds})


def rotate_by_table(table: Tensor, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """Rotary tables for positions (n_rows,) from a table (n_positions, 2 * n_pairs) of sines, then cosines."""
    sine, cosine = table[positions.to(table.device)].to(dtype).chunk(2, dim=-1)

    return Rotary({"": (cosine[None], sine[None])})


def bias_by_position(module: Any, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """A table of ALiBi's biases, slope times position, (1, n_rows, n_heads) float32, for positions (n_rows,).

    Press et al. 2022, "Train short, test long". The bias of a key is enough: that of the query is the same for all keys
    of a row, so softmax takes it away. module: a part of the model that has `num_heads`"""
    slopes = torch.tensor(_slopes(module.num_heads), device=positions.device)

    return Rotary({"": ((positions[:, None] * slopes)[None],)})


def bias_in_bfloat16(module: Any, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """As `bias_by_position`, rounded to bfloat16, as Falcon computes it in every dtype."""
    slopes = torch.tensor(_slopes(module.num_heads), device=positions.device).bfloat16()

    return Rotary({"": ((positions[:, None] * slopes)[None].float(),)})


# The functions that a row may name.
ATTENDS: tuple[Attend, ...] = (
    *(attend_by_interface, attend_before_scaling, attend_in_pairs, attend_fused_in_pairs, attend_unscaled),
    *(attend_fused, attend_fused_with_bias, attend_fused_with_scaled_bias),
)
ROTATES: tuple[Rotate, ...] = (rotate_by_module, rotate_by_table, bias_by_position, bias_in_bfloat16)

# Those that need `ModelAdapter.packed` to replace the interface.
BY_INTERFACE = (attend_by_interface, attend_before_scaling)


def _mix_in_pairs(module: Any, parts: Sequence[Tensor], plan: Plan, table: Table | None, dtype: torch.dtype) -> Tensor:
    """GPT-J's attention behind its projections, whose outputs are (1, n_heads, n_rows, head_dim)."""
    if table is None:
        raise ValueError(f"{type(module).__name__}: a row for it needs rotary tables")

    query, key, value = parts
    working = torch.promote_types(dtype, torch.float32)
    query, key = (_turn_pairs(part, *table).to(working) for part in (query, key))
    mixed = plan(module.layer_idx, query, key, value.to(working), module.head_dim**-0.5)

    return module.out_proj(mixed[0].flatten(1).to(dtype))


def _mix_with_bias(
    layer: int, parts: Sequence[Tensor], plan: Plan, table: Table | None, scale: float, weight: float
) -> Tensor:
    """softmax(scale * (q k^T + weight * bias of the key)) v of all rows, (n_rows, n_heads * head_dim), in float32 at
    least.

    The bias is one more element of the key, beside a one in the query: whatever holds keys holds it too.
    parts: query, key, value, (1, n_heads or n_kv_heads, n_rows, head_dim); table: (1, n_rows, n_heads) biases"""
    if table is None:
        raise ValueError("a row with biases needs a function that makes their table")

    query, key, value = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))

    bias = (table[0].transpose(1, 2)[..., None] * weight).to(key.dtype)
    mixed = plan(
        layer,
        torch.cat([query, torch.ones_like(bias)], -1),
        torch.cat([key, bias], -1),
        torch.cat([value, torch.zeros_like(bias)], -1),
        scale,
    )

    return mixed[0, :, :, :-1].flatten(1)


def _split_groups(fused: Tensor, n_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (1, n_heads, n_rows, head_dim), keys and values (1, n_groups, n_rows, head_dim) of the output of one
    projection: per group its queries, one key, one value."""
    n_rows, width = fused.shape
    n_groups = (width // head_dim - n_heads) // 2
    groups = fused.view(n_rows, n_groups, n_heads // n_groups + 2, head_dim)

    query = groups[:, :, :-2].reshape(n_rows, n_heads, head_dim)

    return query.transpose(0, 1)[None], groups[:, :, -2].transpose(0, 1)[None], groups[:, :, -1].transpose(0, 1)[None]


def _turn_pairs(part: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the first n_pairs pairs of neighbouring elements of queries or keys.

    part: (1, n_heads, n_rows, head_dim); cosine, sine: (1, n_rows, n_pairs)"""
    width = 2 * cosine.shape[-1]
    even, odd = part[..., 0:width:2], part[..., 1:width:2]
    turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1).flatten(-2)

    return torch.cat((turned, part[..., width:]), dim=-1)


def _turn_halves(part: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate queries or keys (1, n_heads, n_rows, head_dim), each element with the one half a head away.

    cosine, sine: (1, n_rows, head_dim)"""
    first, second = part.chunk(2, dim=-1)

    return part * cosine[:, None] + torch.cat((-second, first), dim=-1) * sine[:, None]


def _slopes(n_heads: int) -> list[float]:
    """ALiBi's slope of each head: 2^(-8 i / n) for n heads, a power of two; between two powers, the slopes of the lower
    one, and every second of those of the higher one."""
    lower = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * i / lower) for i in range(1, lower + 1)]
    between = [2 ** (-8 * i / (2 * lower)) for i in range(1, 2 * (n_heads - lower) + 1, 2)]

    return slopes + between
