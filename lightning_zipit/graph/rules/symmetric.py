"""Rules of permutation-invariant operators: reductions, softmax, normalization to unit length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from lightning_zipit.graph.align import entrywise, mix
from lightning_zipit.graph.computed import with_axes
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Trait, module_rule, rule, spellings
from lightning_zipit.graph.values import Features, Parameter, Value

Dims: TypeAlias = "int | Sequence[int] | None"


def axes_of(x: Features | Parameter, dims: Dims) -> set[int]:
    """Return the reduced axes, counted from the front; all axes if ``dims`` is ``None`` or empty."""
    if isinstance(dims, int):
        return {dims % x.rank}
    return {dim % x.rank for dim in dims} if dims else set(range(x.rank))


def reduced(ctx: Context, input: Value, dims: Dims, keepdim: bool) -> Value:
    """Reduce positions of each feature. A reduction over the features of a head leaves one feature per head."""
    if isinstance(input, Parameter) and input.counts:
        axes = axes_of(input, dims)
        kept = [None if axis in axes else axis for axis in range(input.rank) if keepdim or axis not in axes]
        return with_axes(input, ctx.shapes[ctx.node.name], kept)
    if not isinstance(input, Features):
        return ctx.constant([input])
    axes = axes_of(input, dims)
    if 0 in axes:
        raise ctx.error("it reduces over the batch")
    ids = mix(ctx, input, axes)
    if ids is None:
        return ctx.constant([])
    dropped = set() if keepdim else axes
    return Features(ids, tuple(axis - sum(gone < axis for gone in dropped) for axis in input.axes if axis not in axes))


@rule(
    *spellings("mean nanmean sum nansum prod amax amin logsumexp all any count_nonzero"),
    traits=Trait.POOLING | Trait.SYMMETRIC,
)
def reduction(ctx: Context, input: Value, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    """Reduce positions of each feature. A reduction over the features of a head leaves one feature per head."""
    return reduced(ctx, input, dim, keepdim)


@rule(*spellings("std var"), traits=Trait.POOLING | Trait.SYMMETRIC)
def spread(
    ctx: Context,
    input: Value,
    dim: Dims = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Value:
    """Reduce positions of each feature. A reduction over the features of a head leaves one feature per head."""
    # `x.std(False)` passes `unbiased` in place of `dim`.
    return reduced(ctx, input, None if isinstance(dim, bool) else dim, keepdim)


@rule(*spellings("std_mean var_mean"), traits=Trait.POOLING | Trait.SYMMETRIC)
def spread_and_mean(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> tuple[Value, Value]:
    """Reduce positions of each feature. A reduction over the features of a head leaves one feature per head."""
    value = spread(ctx, input, *args, **kwargs)
    return value, value


@rule(*spellings("max min"), traits=Trait.POOLING | Trait.SYMMETRIC)
def extreme(ctx: Context, input: Value, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Any:
    """Reduce all entries, reduce along an axis with indices, or compare two tensors elementwise."""
    if other is not None or not (dim is None or isinstance(dim, int)):
        return entrywise(ctx, input, dim if other is None else other)
    if dim is None:
        return reduced(ctx, input, None, keepdim=False)
    if isinstance(input, Features) and dim % input.rank in input.axes:
        raise ctx.error("it returns indices of features")
    value = reduced(ctx, input, dim, keepdim)
    return value, value


@rule(*spellings("argmax argmin"), traits=Trait.POOLING)
def place_of_extreme(ctx: Context, input: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    """Reduce positions of each feature to an index."""
    if isinstance(input, Features) and (dim is None or dim % input.rank in input.axes):
        raise ctx.error("it returns indices of features")
    return reduced(ctx, input, dim, keepdim)


@rule(*spellings("norm"), traits=Trait.POOLING | Trait.SYMMETRIC)
def norm(
    ctx: Context, input: Value, p: Any = "fro", dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    """Reduce positions of each feature. A reduction over the features of a head leaves one feature per head."""
    if p == "nuc":
        raise ctx.error("it computes the nuclear norm, which needs singular values")
    return reduced(ctx, input, dim, keepdim)


@rule(torch.linalg.vector_norm, traits=Trait.POOLING | Trait.SYMMETRIC)
def vector_norm(
    ctx: Context, input: Value, ord: Any = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    """Reduce positions of each feature. A reduction over the features of a head leaves one feature per head."""
    return reduced(ctx, input, dim, keepdim)


# Normalizations that preserve the shape


def mixed(ctx: Context, input: Value, axes: Dims) -> Value:
    """Normalize entries along some axes jointly, and preserve features."""
    if isinstance(input, Parameter) and input.counts:
        return input
    if not isinstance(input, Features):
        return ctx.constant([input])
    mix(ctx, input, axes_of(input, axes))
    return input


@rule(*spellings("softmax log_softmax softmin"), traits=Trait.SYMMETRIC)
def softmax(ctx: Context, input: Value, dim: int | None = None, _stacklevel: Any = 3, dtype: Any = None) -> Value:
    """Normalize entries along an axis jointly, and preserve features."""
    return mixed(ctx, input, _implicit(input) if dim is None else dim)


def _implicit(input: Value) -> int:
    """Return the axis that torch chooses without ``dim``, by the number of axes."""
    return 0 if len(input.shape or ()) in (0, 1, 3) else 1


@module_rule(nn.Softmax, nn.LogSoftmax, nn.Softmin, traits=Trait.SYMMETRIC)
def softmax_module(ctx: Context, module: nn.Softmax, input: Value) -> Value:
    """Normalize entries along an axis jointly, and preserve features."""
    return softmax(ctx, input, module.dim)


@module_rule(nn.Softmax2d, traits=Trait.SYMMETRIC)
def softmax_of_channels(ctx: Context, module: nn.Softmax2d, input: Value) -> Value:
    """Normalize entries along an axis jointly, and preserve features."""
    return mixed(ctx, input, -3)


@rule(*spellings("normalize"), traits=Trait.SYMMETRIC)
def normalize(ctx: Context, input: Value, p: float = 2.0, dim: Dims = 1, eps: float = 1e-12) -> Value:
    """Normalize entries along an axis jointly, and preserve features."""
    return mixed(ctx, input, dim)
