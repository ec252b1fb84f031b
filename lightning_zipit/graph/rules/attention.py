"""Products of activations with activations: matrix products, einsum, and attention with its heads."""

from __future__ import annotations

import operator
import string
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lightning_zipit.graph.align import broadcast, contract
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Trait, module_rule, rule
from lightning_zipit.graph.values import Features, Ids, Parameter, Plain, Value


@rule(torch.einsum)
def einsum(ctx: Context, equation: str, *operands: Any) -> Value:
    operands = tuple(operands[0]) if isinstance(operands[0], (tuple, list)) else operands
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if len(operands) == 1:
        operands, letters = (*operands, Plain(())), [*letters, ""]
    if len(operands) != 2 or "." in equation or not arrow:
        raise ctx.error("only an einsum of two tensors, with an explicit result and no dots, is understood")
    return contract(ctx, (letters[0], letters[1]), output, (operands[0], operands[1]))


@rule(torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__")
def matmul(ctx: Context, input: Value, other: Value) -> Value:
    if not isinstance(input, Features) and not isinstance(other, Features):
        return Plain()
    if input.shape is None or other.shape is None:
        raise ctx.error("it multiplies features with a tensor of unknown size")
    rank = max(len(input.shape), len(other.shape))
    if min(len(input.shape), len(other.shape)) < 2:
        raise ctx.error("it multiplies with a vector")
    batch = string.ascii_lowercase[: rank - 2]
    first, second = batch[rank - len(input.shape) :] + "XY", batch[rank - len(other.shape) :] + "YZ"
    return contract(ctx, (first, second), batch + "XZ", (input, other))


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    ctx: Context, query: Value, key: Value, value: Value, attn_mask: Any = None, *args: Any, **kwargs: Any
) -> Value:
    """Heads are units; queries are tied to keys, and the result has the features of the values."""
    if query.shape is None:
        return Plain()
    batch = string.ascii_lowercase[: len(query.shape) - 2]
    scores = contract(ctx, (batch + "LE", batch + "SE"), batch + "LS", (query, key))
    if isinstance(attn_mask, (Parameter, Features)) and isinstance(scores, Features):
        broadcast(ctx, scores, attn_mask)
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
    ctx: Context, module: nn.MultiheadAttention, query: Value, key: Value, value: Value, *args: Any, **kwargs: Any
) -> Any:
    """Its own in- and output projections around heads, as one operator."""
    if module.bias_k is not None or not module._qkv_same_embed_dim or not (query is key is value):
        raise ctx.error("only self-attention of one embedding size is understood")
    units = ctx.fresh(module.num_heads)
    values = _heads(ctx, query, ctx.weight("in_proj_weight"), ctx.parameter("in_proj_bias"), len(units), units, "qqv")
    return _project_out(ctx, query, values, ctx.weight("out_proj.weight"), ctx.parameter("out_proj.bias")), None


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
    units = ctx.fresh(num_heads)
    scores = Features(units, (1,), (1, num_heads, 1, 1))
    for of_heads in (relative_position_bias, logit_scale):
        broadcast(ctx, scores, of_heads)
    values = _heads(ctx, input, qkv_weight, qkv_bias, num_heads, units, "qqv")
    return _project_out(ctx, input, values, proj_weight, proj_bias)


@rule("torchvision.models.swin_transformer._get_relative_position_bias")
def relative_position_bias(ctx: Context, table: Value, index: Any, window_size: Any) -> Value:
    """``(entries, heads)`` to ``(1, heads, positions, positions)``."""
    shape = ctx.shapes[ctx.node.name]
    if isinstance(table, Parameter):
        return replace(table, shape=shape, axes=(None, table.axes[-1], None, None))
    return Features(table.ids, (1,), shape) if isinstance(table, Features) else Plain()


@rule("torchvision.models.swin_transformer._patch_merging_pad")
def patch_merging(ctx: Context, x: Value) -> Value:
    """Four neighbouring positions become four copies of the features, side by side."""
    return Features(np.tile(x.ids, 4), x.axes) if isinstance(x, Features) else Plain()
