"""Rules of operators that read or write entries at positions that a tensor gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_zipit.graph.align import broadcast, fix_inner
from lightning_zipit.graph.computed import with_axes
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Trait, rule, spellings
from lightning_zipit.graph.values import Features, Parameter, Plain, Shape, Value


def _positions(ctx: Context, x: Features, dim: int) -> None:
    if dim % x.rank in x.axes:
        raise ctx.error("it selects features by data")


def _same_for_all(ctx: Context, x: Features, index: Value, dim: int) -> None:
    """Fix the order of the features that an index selects different positions of."""
    if not isinstance(index, Plain) or index.shape is None or len(index.shape) != x.rank:
        raise ctx.error("its index is computed from features, or of unknown shape")
    if any(index.shape[axis] != x.shape[axis] for axis in x.axes):
        raise ctx.error("it reads some of the features only")
    varying = tuple(axis for axis in x.axes if axis not in index.alike and x.shape[axis] > 1)
    if varying:
        fix_inner(ctx, x, varying, f"`{ctx.node.name}` reads each of them at positions of its own")


@rule(*spellings("gather"), traits=Trait.POOLING)
def gather(ctx: Context, input: Value, dim: int, index: Value, *, sparse_grad: bool = False) -> Value:
    """Read positions along one axis, given by an index."""
    if isinstance(index, Features):
        raise ctx.error("its index is computed from features")
    ctx.positional(index)
    if isinstance(input, Parameter) and input.counts:
        shape, dim = ctx.shapes[ctx.node.name], dim % input.rank
        alike = index.alike if isinstance(index, Plain) else ()
        return with_axes(input, shape, [axis if axis != dim and axis in alike else None for axis in range(input.rank)])
    if not isinstance(input, Features):
        return ctx.constant([input])
    _positions(ctx, input, dim)
    _same_for_all(ctx, input, index, dim)
    return Features(input.ids, input.axes)


@rule(*spellings("take_along_dim"), traits=Trait.POOLING)
def take_along(ctx: Context, input: Value, indices: Value, dim: int | None = None) -> Value:
    """Read positions along one axis, given by an index."""
    if dim is None and isinstance(input, Features):
        raise ctx.error("it selects features by data")
    if isinstance(indices, Plain) and indices.shape is not None and isinstance(input, Features):
        single = [axis for axis, size in enumerate(indices.shape) if size == 1]  # broadcast over the input
        sizes = tuple(input.shape[axis] if axis in single else size for axis, size in enumerate(indices.shape))
        indices = Plain(sizes, (*indices.alike, *single))
    return gather(ctx, input, dim or 0, indices)


def written(ctx: Context, input: Value, dim: int, source: Any) -> Value:
    """Write a tensor into another, at positions along one axis. Their features are tied."""
    features = [value for value in (input, source) if isinstance(value, Features)]
    if not features:
        return ctx.constant([input])
    largest = max(features, key=lambda value: value.ids.size)
    _positions(ctx, largest, dim)
    shape = ctx.shapes[ctx.node.name]
    if largest.rank != len(shape) or any(largest.shape[axis] != shape[axis] for axis in largest.axes):
        raise ctx.error("it writes some of the features only")
    together = replace(largest, shape=_at_one(shape, dim))
    for value in (input, source):
        if value is not largest and isinstance(value, (Features, Parameter, Plain)):
            broadcast(ctx, together, _at_one_position(value, dim, len(shape)))
    return Features(largest.ids, largest.axes)


def _at_one(shape: Shape, dim: int) -> Shape:
    return tuple(1 if axis == dim % len(shape) else size for axis, size in enumerate(shape))


def _at_one_position(value: Value, dim: int, rank: int) -> Value:
    """Return a tensor at one position along an axis."""
    if value.shape is None or len(value.shape) != rank:
        return value
    if isinstance(value, Parameter):
        shown = [None if axis == dim % rank else axis for axis in range(rank)]
        return with_axes(value, _at_one(value.shape, dim), shown) if value.counts else value
    return replace(value, shape=_at_one(value.shape, dim))


@rule(*spellings("scatter scatter_add scatter_reduce"))
def scatter(ctx: Context, input: Value, dim: int, index: Value, src: Any = None, *args: Any, **kwargs: Any) -> Value:
    """Write positions along one axis, given by an index, and tie the features of both tensors."""
    if isinstance(index, Features):
        raise ctx.error("its index is computed from features")
    result = written(ctx, input, dim, src)
    if isinstance(result, Features):
        _same_for_all(ctx, replace(result, shape=ctx.shapes[ctx.node.name]), index, dim)
    return result


@rule(*spellings("index_add index_copy index_fill"))
def index_write(ctx: Context, input: Value, dim: int, index: Value, source: Any, *args: Any, **kwargs: Any) -> Value:
    """Write positions along one axis, given by an index, and tie the features of both tensors."""
    if isinstance(index, Features):
        raise ctx.error("its index is computed from features")
    return written(ctx, input, dim, source)


@rule(*spellings("slice_scatter"))
def slice_scatter(
    ctx: Context, input: Value, src: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    """Write a slice of positions, or of features."""
    features = [value for value in (input, src) if isinstance(value, Features)]
    if not features:
        return ctx.constant([input])
    axis = dim % features[0].rank
    if axis not in features[0].axes:
        return written(ctx, input, dim, src)
    if any(value.axes != (axis,) for value in features):
        raise ctx.error("it writes a slice of features, and its inputs have features along other axes")
    ids = _as_features(ctx, input, axis).copy()
    ids[slice(start, end, step)] = _as_features(ctx, src, axis)
    return Features(ids, (axis,))


def _as_features(ctx: Context, value: Value, axis: int) -> Any:
    """Return the features along an axis; new ones of a tensor without features."""
    if isinstance(value, Features):
        return value.ids
    if not isinstance(value, Plain) or value.shape is None:
        raise ctx.error("it writes a slice of features, and one of its inputs is a parameter")
    made = ctx.fresh(value.shape[axis])
    if axis not in value.alike:
        ctx.pin(made, f"`{ctx.node.name}` writes features into a tensor without features")
    return made


@rule(*spellings("select_scatter"))
def select_scatter(ctx: Context, input: Value, src: Value, dim: int, index: int) -> Value:
    """Write one position, and tie the features of both tensors."""
    rank = len(ctx.shapes[ctx.node.name])
    if src.shape is None:
        raise ctx.error("it writes a tensor of unknown shape")
    dim %= rank
    wide = (*src.shape[:dim], 1, *src.shape[dim:])
    if isinstance(src, Features):
        src = replace(src, axes=tuple(axis + (axis >= dim) for axis in src.axes), shape=wide)
    elif isinstance(src, Parameter):
        src = with_axes(src, wide, [*range(dim), None, *range(dim, src.rank)])
    else:
        src = Plain(wide, tuple(axis + (axis >= dim) for axis in src.alike))
    return written(ctx, input, dim, src)


@rule(*spellings("index_put"))
def index_put(ctx: Context, input: Value, indices: Sequence[Any], values: Value, accumulate: bool = False) -> Value:
    """Write positions, given by indices, and tie the features of both tensors."""
    if any(isinstance(index, Features) for index in indices):
        raise ctx.error("its indices are computed from features")
    if not isinstance(input, Features):
        if isinstance(values, Features):
            raise ctx.error("it writes features into a tensor without features")
        return ctx.constant([input])
    last = max((_last_axis(ctx, indices)), default=-1)
    if any(axis <= last for axis in input.axes):
        raise ctx.error("it selects features by data, or the axes of its values are not known")
    count = input.rank - 1 - last
    inner = Features(input.ids, tuple(axis - last - 1 for axis in input.axes), input.shape[last + 1 :])
    broadcast(ctx, inner, _last_axes(ctx, values, count))
    return Features(input.ids, input.axes)


def _last_axis(ctx: Context, indices: Sequence[Any]) -> list[int]:
    """Return the axes that indices select from; a mask selects from as many axes as it has."""
    axes: list[int] = []
    axis = 0
    for index, node in zip(indices, _nodes(ctx), strict=True):
        mask = node is not None and node.meta.get("dtype") == torch.bool
        size = len(index.shape or ()) if mask and index is not None else 1
        axes += range(axis, axis + size) if index is not None else []
        axis += size
    return axes


def _nodes(ctx: Context) -> Sequence[Any]:
    nodes = ctx.node.args[1]
    assert isinstance(nodes, (tuple, list))
    return nodes


def _last_axes(ctx: Context, value: Value, count: int) -> Value:
    """Return a tensor at one position along all axes but the last."""
    shape = value.shape
    if shape is None:
        raise ctx.error("it writes a tensor of unknown shape")
    first = max(len(shape) - count, 0)
    if isinstance(value, Features):
        if any(axis < first for axis in value.axes):
            raise ctx.error("its values have features along an axis of positions")
        return replace(value, axes=tuple(axis - first for axis in value.axes), shape=shape[first:])
    if isinstance(value, Parameter):
        return with_axes(value, shape[first:], range(first, len(shape))) if value.counts else value
    return Plain(shape[first:], tuple(axis - first for axis in value.alike if axis >= first))


# Entries that a slice or a mask selects are written by torch's own functions; these have no function in torch


def copy(ctx: Context, input: Value, src: Value, non_blocking: bool = False) -> Value:
    """Copy a tensor of the same shape."""
    ctx.positional(input)
    if src.shape != input.shape:
        raise ctx.error("it copies a tensor of another shape")
    return src


def fill(ctx: Context, input: Value, value: Any) -> Value:
    """Fill a tensor with one number."""
    ctx.positional(input, value)
    if isinstance(value, Features):
        raise ctx.error("it fills a tensor with a feature")
    shape = ctx.shapes[ctx.node.name]
    return Plain(shape, tuple(range(len(shape))))
