"""Ties of elementwise operators: operands broadcast at their last axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_zipit.graph.computed import broadcast_shape, combined
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.values import Features, Ids, Parameter, Plain, Shape, Value, leaves


def units_along(ctx: Context, x: Features, kept: tuple[int, ...], kind: str = "heads") -> Ids:
    """Make units of the entries along some of the feature axes.

    Args:
        ctx: the context.
        x: features along several axes.
        kept: the axes of the units, a part of ``x.axes`` in the same order.
        kind: plural name of the units for messages.

    Returns:
        One feature for each entry along ``kept``, with the sizes of these axes.
    """
    if kept == x.axes:
        return x.ids
    ids = _kept_first(x, kept)
    return ctx.units(ids.reshape(-1, ids.shape[-1]), kind).reshape(ids.shape[:-1])


def _kept_first(x: Features, kept: tuple[int, ...]) -> Ids:
    """Move the kept axes of the features to the front, and flatten all others into one last axis."""
    order = [*(x.axes.index(axis) for axis in kept), *(i for i, axis in enumerate(x.axes) if axis not in kept)]
    ids = x.ids.transpose(order)
    return ids.reshape(*ids.shape[: len(kept)], -1)


def mix(ctx: Context, x: Features, axes: set[int]) -> Ids | None:
    """Record an operator that is permutation-invariant along some axes, such as a sum, a norm or a softmax.

    Returns:
        One feature for each entry along the remaining feature axes; ``None`` if none remains.
    """
    kept = tuple(axis for axis in x.axes if axis not in axes)
    if kept == x.axes:
        return x.ids
    ctx.mix(x)
    return units_along(ctx, x, kept) if kept else None


def fix_inner(ctx: Context, x: Features, axes: tuple[int, ...], why: str) -> None:
    """Pin the order of entries along some of the feature axes. Units along the other axes can still be reordered."""
    kept = tuple(axis for axis in x.axes if axis not in axes)
    if not kept:
        ctx.pin(x, why)
        return
    ids = _kept_first(x, kept)
    for inner in range(1, ids.shape[-1]):
        ctx.tie(ids[..., 0], ids[..., inner])


def by_channel(ctx: Context, x: Features, first: int) -> Features:
    """Fix the order of entries along the axes from ``first`` on, where an operator reads positions.

    Features along further axes, such as the channels of an image that a linear layer computes, can still be reordered.
    """
    inner = tuple(axis for axis in x.axes if axis >= (first if first >= 0 else first + x.rank))
    if not inner:
        return x
    if inner == x.axes:
        raise ctx.error("it treats an axis of features as positions")
    return as_positions(ctx, x, inner)


def as_positions(ctx: Context, x: Features, axes: tuple[int, ...]) -> Features:
    """Fix the order of entries along some, but not all, of the feature axes, which another tensor has positions on."""
    fix_inner(ctx, x, axes, f"{_node_name(ctx)} reads them as positions")
    index = tuple(0 if axis in axes else slice(None) for axis in x.axes)
    return replace(x, ids=x.ids[index], axes=tuple(axis for axis in x.axes if axis not in axes))


def entrywise(ctx: Context, *operands: Any) -> Any:
    """Record an elementwise operator, which computes each entry from the corresponding entries of its operands.

    Args:
        ctx: the context.
        operands: tensors that are broadcast, and numbers.

    Returns:
        The value of the result. If no operand has features, a parameter holds positions along the axes of a tensor, and
        writes new features along one additional axis.
    """
    values = [value for value in leaves(operands) if isinstance(value, (Features, Parameter, Plain))]
    if any(isinstance(value, Features) for value in values):
        return broadcast_all(ctx, values)
    if len(values) == 1 and not isinstance(values[0], Plain):
        return values[0]
    parameters = [value for value in values if isinstance(value, Parameter) and value.counts]
    rank = max((len(parameter.shape) for parameter in parameters), default=0)
    if parameters and all(_is_number(value, rank) for value in values if value not in parameters):
        ctx.positional([value for value in values if isinstance(value, Parameter) and not value.counts])
        return combined(parameters)
    if all(parameter.constant for parameter in parameters):
        return ctx.constant(list(leaves(operands)))
    return _make(ctx, parameters, [value.shape for value in values if isinstance(value, Plain)])


def _is_number(value: Value, rank: int) -> bool:
    """Whether a value has a single entry, so that it can be broadcast over tensors of some number of axes."""
    return value.shape is not None and len(value.shape) <= rank and math.prod(value.shape) == 1


def _make(ctx: Context, parameters: Sequence[Parameter], positions: Sequence[Shape | None]) -> Value:
    """Combine parameters with positions. Along an axis that only parameters have, their entries are new features."""
    if any(shape is None for shape in positions):
        raise ctx.error("it combines parameters with a tensor of unknown size")
    known = [shape for shape in positions if shape is not None]
    full = broadcast_shape([*known, *(parameter.shape for parameter in parameters)])
    covered = broadcast_shape([*known, (1,) * len(full)])
    free = [axis for axis, size in enumerate(full) if covered[axis] != size]
    if len(free) > 1:
        raise ctx.error("its parameters have entries along several axes that the input does not have")
    ctx.positional(parameters)
    if not free:
        return Plain(full)
    made = Features(ctx.fresh(full[free[0]]), (free[0],), full)
    for parameter in parameters:
        _write(ctx, made, parameter)
    return made


def broadcast_all(ctx: Context, operands: Sequence[Any]) -> Features:
    """Align all operands with the operand that has the most features.

    Returns:
        The features of the result.
    """
    features = [value for value in operands if isinstance(value, Features)]
    largest = max(features, key=lambda value: (value.ids.size, value.rank))
    shapes = [value.shape for value in operands if isinstance(value, (Features, Plain)) and value.shape is not None]
    ranks = [len(value.shape) for value in operands if isinstance(value, Parameter)]
    shape = broadcast_shape([*shapes, (1,) * max(ranks, default=0)])
    axes = tuple(axis + len(shape) - largest.rank for axis in largest.axes)
    together = replace(largest, axes=axes, shape=shape, alike=())
    fixed = tuple(axis for axis in axes if any(_has_positions(value, axis - len(shape)) for value in features))
    if fixed and fixed != axes:
        together = as_positions(ctx, together, fixed)
    for value in operands:
        if value is not largest:
            broadcast(ctx, together, value)
    return together


def _has_positions(value: Features, axis: int) -> bool:
    """Whether a tensor has several positions along an axis, counted from the back."""
    return _size(value, axis) != 1 and axis + value.rank not in value.axes


def broadcast(ctx: Context, x: Features, other: Any) -> None:
    """Align another operand with ``x`` at their last axes. It must not have more features than ``x``."""
    if isinstance(other, Features):
        _tie(ctx, x, other)
    elif isinstance(other, Parameter):
        _write(ctx, x, other)
    elif isinstance(other, Plain):
        if other.shape is None:
            ctx.pin(x, f"{_node_name(ctx)} combines them with a tensor without features")
            return
        _pin_order(ctx, x, other)


def _pin_order(ctx: Context, x: Features, other: Plain | Parameter) -> None:
    """Pin the order of features along the axes where another operand has several entries."""
    varying = tuple(axis for axis in x.axes if _size(other, axis - x.rank) != 1)
    if varying:
        fix_inner(ctx, x, varying, f"{_node_name(ctx)} combines them with a tensor without features")


def _tie(ctx: Context, first: Features, second: Features) -> None:
    axes = {axis - first.rank for axis in first.axes}
    others = {axis - second.rank for axis in second.axes}
    if second.ids.size == 1 and first.ids.size > 1:
        ctx.pin(second, f"{_node_name(ctx)} broadcasts one feature over several")  # even if it is on another axis
        return
    if others.isdisjoint(axes) and all(_size(second, axis) == 1 for axis in axes):
        ctx.pin(second, f"{_node_name(ctx)} combines them with positions")  # such as one weight per expert
        return
    if not others <= axes:
        raise ctx.error("the features of its two inputs are on different axes")
    if any(_size(second, axis) != 1 for axis in axes - others):
        raise ctx.error("one of its inputs has features on an axis where the other has positions")
    kept = tuple(axis for axis in first.axes if axis - first.rank in others)
    ctx.tie(units_along(ctx, first, kept), second.ids)


def _write(ctx: Context, x: Features, parameter: Parameter) -> None:
    """Align a parameter with features: it writes one entry per feature, or one entry per head."""
    if not parameter.counts:
        return _pin_order(ctx, x, parameter)
    own = [axis - x.rank for axis in range(x.rank) if axis not in x.axes]
    if any(_size(parameter, axis) not in (1, x.shape[axis]) for axis in own) or len(parameter.shape) > x.rank:
        raise ctx.error(f"`{parameter.name}` has entries along an axis that its other input does not have")
    ctx.positional(parameter)
    varying = tuple(axis for axis in x.axes if _size(parameter, axis - x.rank) != 1)
    if not varying:
        return None
    if varying[1:] or varying[0] != x.axes[0]:
        if not parameter.constant:
            raise ctx.error(f"it combines `{parameter.name}` with the features of several heads")
        return _pin_order(ctx, x, parameter)
    axis = varying[0] - x.rank + len(parameter.shape)
    if parameter.constant and parameter.along(axis) is None:
        return _pin_order(ctx, x, parameter)
    ctx.write(parameter, axis, x if len(x.axes) == 1 else units_along(ctx, x, varying))
    return None


def _size(value: Value, axis: int) -> int:
    """Return the size of an axis, counted from the back; 1 if the value does not have it, or is the same along it."""
    assert value.shape is not None
    if -axis > len(value.shape) or (not isinstance(value, Parameter) and axis + len(value.shape) in value.alike):
        return 1
    return value.shape[axis]


def _node_name(ctx: Context) -> str:
    return f"`{ctx.node.name}`"
