"""Rules of attention operators."""

from __future__ import annotations

import string
from dataclasses import replace
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import nn

from lightning_zipit.graph.align import broadcast, entrywise
from lightning_zipit.graph.computed import with_axes
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
    """Treat heads as units and tie queries to keys. The output has the features of the values."""
    if dropout_p:
        raise ctx.error("it applies dropout in eval mode too (`dropout_p`)")
    if query.shape is None:
        raise ctx.error("the shape of its queries is unknown")
    if enable_gqa:
        key, value = (_repeated(ctx, each, query.shape[-3]) for each in (key, value))
    batch = string.ascii_lowercase[: len(query.shape) - 2]
    scores = contract(ctx, (batch + "LE", batch + "SE"), batch + "LS", (query, key))
    if attn_mask is not None:
        scores = entrywise(ctx, scores, attn_mask)
    return contract(ctx, (batch + "LS", batch + "SV"), batch + "LV", (scores, value))


def _repeated(ctx: Context, x: Value, heads: int) -> Value:
    """Repeat the heads of keys or values, which several heads of queries share."""
    if x.shape is None or isinstance(x, Parameter):
        raise ctx.error("its keys or values are parameters, or of unknown shape")
    axis, times = len(x.shape) - 3, heads // x.shape[-3]
    shape = (*x.shape[:axis], heads, *x.shape[axis + 1 :])
    if isinstance(x, Features) and axis in x.axes:
        return replace(x, ids=np.repeat(x.ids, times, x.axes.index(axis)), shape=shape)
    return replace(x, shape=shape)


def _heads(
    ctx: Context, x: Value, weight: Parameter, bias: Parameter | None, heads: int, units: Ids, parts: str
) -> Ids:
    """Record the input projection of attention, and return the features of the values per head.

    ``parts`` has a letter for each part of the weight's rows. Parts with the same letter share their features.
    """
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
    """Read features with its input projections and write new ones with its output projection. Heads are units."""
    if module.bias_k is not None or not module._qkv_same_embed_dim or not (query is key is value):
        raise ctx.error("only self-attention with one embedding size and without `bias_k` is supported")
    if isinstance(query, Parameter) or (isinstance(query, Plain) and query.shape is not None):
        raise ctx.error("its input holds no features, so the features of its heads cannot be measured")
    if any(
        not isinstance(mask, Plain) or len(mask.shape or ()) > 2
        for mask in (attn_mask, key_padding_mask)
        if mask is not None
    ):
        raise ctx.error("its mask differs between heads, or is computed from features or parameters")
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
    """Read features with its input projections and write new ones with its output projection. Heads are units."""
    if isinstance(input, Parameter) or (isinstance(input, Plain) and input.shape is not None):
        raise ctx.error("its input holds no features, so the features of its heads cannot be measured")
    units = ctx.fresh(num_heads)
    positions = int(np.prod(window_size))
    scores = Features(units, (1,), (1, num_heads, positions, positions))
    for of_heads in (relative_position_bias, logit_scale):
        broadcast(ctx, scores, of_heads)
    values = _heads(ctx, input, qkv_weight, qkv_bias, num_heads, units, "qqv")
    return _project_out(ctx, input, values, proj_weight, proj_bias)


@rule("torchvision.models.swin_transformer._get_relative_position_bias")
def relative_position_bias(ctx: Context, table: Value, index: Any, window_size: Any) -> Value:
    """Look up ``(entries, heads)`` as ``(1, heads, positions, positions)``. Heads are features."""
    shape = ctx.shapes[ctx.node.name]
    ctx.positional(index)
    if isinstance(table, Parameter):
        return with_axes(table, shape, (None, table.rank - 1, None, None))
    return Features(table.ids, (1,), shape) if isinstance(table, Features) else ctx.constant([table])


@rule("torchvision.models.swin_transformer._patch_merging_pad")
def patch_merging(ctx: Context, x: Value) -> Value:
    """Concatenate four neighboring positions: four copies of the features."""
    if not isinstance(x, Features):
        return ctx.constant([x])
    if x.axes != (x.rank - 1,):
        raise ctx.error("its features are not on the last axis only")
    return Features(np.tile(x.ids, 4), x.axes)
