"""Attention with its heads."""

from __future__ import annotations

import string
from dataclasses import replace
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import nn

from lightning_zipit.graph.align import broadcast, entrywise
from lightning_zipit.graph.contraction import contract
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Trait, module_rule, rule
from lightning_zipit.graph.values import Features, Ids, Parameter, Plain, Value


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    ctx: Context,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Value:
    """Heads are units; queries are tied to keys, and the result has the features of the values."""
    if dropout_p:
        raise ctx.error("it drops entries at random in eval mode too")
    if enable_gqa:
        raise ctx.error("its heads share keys and values in groups")
    if query.shape is None:
        raise ctx.error("the size of its queries is not known")
    batch = string.ascii_lowercase[: len(query.shape) - 2]
    scores = contract(ctx, (batch + "LE", batch + "SE"), batch + "LS", (query, key))
    if attn_mask is not None:
        scores = entrywise(ctx, scores, attn_mask)
    return contract(ctx, (batch + "LS", batch + "SV"), batch + "LV", (scores, value))


def _heads(
    ctx: Context, x: Value, weight: Parameter, bias: Parameter | None, heads: int, units: Ids, parts: str
) -> Ids:
    """The features of each head that rows of a projection make: queries and keys share theirs; values come last."""
    size = weight.shape[0] // len(parts)
    made = {part: ctx.fresh(heads, size // heads) for part in dict.fromkeys(parts)}
    for ids in made.values():
        ctx.units(ids, "heads", units)
    for index, part in enumerate(parts):
        ctx.project(made[part], x, weight, index * size)
    rows = np.concatenate([made[part].ravel() for part in parts])
    ctx.read(weight, 1, x)
    ctx.write(weight, 0, rows)
    ctx.write(bias, 0, rows)
    return made[parts[-1]]


def _project_out(ctx: Context, x: Value, values: Ids, weight: Parameter, bias: Parameter | None) -> Features:
    ctx.read(weight, 1, values)
    output = Features(ctx.fresh(weight.shape[0]), (len(x.shape or (0, 0, 0)) - 1,))
    ctx.write(weight, 0, output)
    ctx.write(bias, 0, output)
    return output


@module_rule(nn.MultiheadAttention, traits=Trait.PRODUCER, ignored=("dropout",))
def multihead_attention_module(
    ctx: Context,
    module: nn.MultiheadAttention,
    query: Value,
    key: Value,
    value: Value,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Its own in- and output projections around heads, as one operator."""
    if module.bias_k is not None or not module._qkv_same_embed_dim or not (query is key is value):
        raise ctx.error("only self-attention of one embedding size is understood")
    if isinstance(query, Parameter) or (isinstance(query, Plain) and query.shape is not None):
        raise ctx.error("it reads no features, so that nothing measures those of its heads")
    if any(
        not isinstance(mask, Plain) or len(mask.shape or ()) > 2
        for mask in (attn_mask, key_padding_mask)
        if mask is not None
    ):
        raise ctx.error("its mask differs from head to head, or is computed from features or parameters")
    units = ctx.fresh(module.num_heads)
    values = _heads(ctx, query, ctx.weight("in_proj_weight"), ctx.parameter("in_proj_bias"), len(units), units, "qqv")
    output = _project_out(ctx, query, values, ctx.weight("out_proj.weight"), ctx.parameter("out_proj.bias"))
    if not need_weights:
        return output, None
    return output, Plain() if average_attn_weights else Features(units, (1,))


@rule("torchvision.models.swin_transformer.shifted_window_attention", traits=Trait.PRODUCER)
def shifted_window_attention(
    ctx: Context,
    input: Value,
    qkv_weight: Parameter,
    proj_weight: Parameter,
    relative_position_bias: Value,
    window_size: Any,
    num_heads: int,
    *args: Any,
    qkv_bias: Parameter | None = None,
    proj_bias: Parameter | None = None,
    logit_scale: Parameter | None = None,
    **kwargs: Any,
) -> Value:
    """Attention in windows, which torch.fx takes as one function; its biases and scales belong to heads."""
    if isinstance(input, Parameter) or (isinstance(input, Plain) and input.shape is not None):
        raise ctx.error("it reads no features, so that nothing measures those of its heads")
    units = ctx.fresh(num_heads)
    positions = int(np.prod(window_size))
    scores = Features(units, (1,), (1, num_heads, positions, positions))
    for of_heads in (relative_position_bias, logit_scale):
        broadcast(ctx, scores, of_heads)
    values = _heads(ctx, input, qkv_weight, qkv_bias, num_heads, units, "qqv")
    return _project_out(ctx, input, values, proj_weight, proj_bias)


@rule("torchvision.models.swin_transformer._get_relative_position_bias")
def relative_position_bias(ctx: Context, table: Value, index: Any, window_size: Any) -> Value:
    """``(entries, heads)`` to ``(1, heads, positions, positions)``."""
    shape = ctx.shapes[ctx.node.name]
    ctx.positional(index)
    if isinstance(table, Parameter):
        return replace(table, shape=shape, axes=(None, table.axes[-1], None, None))
    return Features(table.ids, (1,), shape) if isinstance(table, Features) else ctx.constant([table])


@rule("torchvision.models.swin_transformer._patch_merging_pad")
def patch_merging(ctx: Context, x: Value) -> Value:
    """Four neighbouring positions become four copies of the features, side by side."""
    if not isinstance(x, Features):
        return ctx.constant([x])
    if x.axes != (x.rank - 1,):
        raise ctx.error("its features are not the last axis alone")
    return Features(np.tile(x.ids, 4), x.axes)
