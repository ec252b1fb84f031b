"""Rules of attention operators."""

from __future__ import annotations

import string
from dataclasses import replace
from typing import Any

import numpy as np
import torch.nn.functional as F

from lightning_zipit.graph.align import entrywise
from lightning_zipit.graph.contraction import contract
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import rule
from lightning_zipit.graph.values import Features, Parameter, Value


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
