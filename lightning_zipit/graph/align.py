"""What broadcasting ties: operands that meet entry by entry, at their last axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.values import Features, Ids, Joined, Parameter, Plain, Shape, Value, leaves


def units_along(ctx: Context, x: Features, kept: tuple[int, ...], kind: str = "heads") -> Ids:
    """Features that stand for the entries of some of the feature axes, each with all that the others hold.

    Args:
        ctx: the context.
        x: features along several axes.
        kept: which of ``x.axes``, in their order.
        kind: for people: what a unit is.

    Returns:
        One feature for each entry along ``kept``, of their sizes.
    """
    if kept == x.axes:
        return x.ids
    ids = _kept_first(x, kept)
    return ctx.units(ids.reshape(-1, ids.shape[-1]), kind).reshape(ids.shape[:-1])


def _kept_first(x: Features, kept: tuple[int, ...]) -> Ids:
    """The features with some of their axes in front, and the others as one axis behind those."""
    order = [*(x.axes.index(axis) for axis in kept), *(i for i, axis in enumerate(x.axes) if axis not in kept)]
    ids = x.ids.transpose(order)
    return ids.reshape(*ids.shape[: len(kept)], -1)


def mix(ctx: Context, x: Features, axes: set[int]) -> Ids | None:
    """The operator treats all entries along some axes alike, as a sum, a norm or a softmax does.

    Returns:
        One feature for each entry along the feature axes that are left; ``None`` where none is.
    """
    kept = tuple(axis for axis in x.axes if axis not in axes)
    if kept == x.axes:
        return x.ids
    ctx.mix(x)
    return units_along(ctx, x, kept) if kept else None


def fix_inner(ctx: Context, x: Features, axes: tuple[int, ...], why: str) -> None:
    """Entries along some of the feature axes keep their order; units along the others can still be reordered."""
    kept = tuple(axis for axis in x.axes if axis not in axes)
    if not kept:
        ctx.pin(x, why)
        return
    ids = _kept_first(x, kept)
    for inner in range(1, ids.shape[-1]):
        ctx.tie(ids[..., 0], ids[..., inner])


def entrywise(ctx: Context, *operands: Any) -> Any:
    """The operator computes each entry from the entries of its operands at the same place.

    Args:
        ctx: the context.
        operands: tensors that are broadcast, and numbers.

    Returns:
        The value of the result. Parameters that no features meet hold positions where they lie along those of a
        tensor, and make new features along one more axis.
    """
    values = [value for value in leaves(operands) if isinstance(value, (Features, Parameter, Plain, Joined))]
    if any(isinstance(value, Features) for value in values):
        return broadcast_all(ctx, values)
    if len(values) == 1 and not isinstance(values[0], Plain):
        return values[0]
    parameters = [value for value in values if isinstance(value, Parameter) and value.counts]
    ranks = [len(value.shape) for value in values if isinstance(value, Parameter)]
    if len(parameters) == 1 and len(ranks) == len(values) and max(ranks) == len(parameters[0].shape):
        return parameters[0]  # the others are single numbers
    if all(parameter.constant for parameter in parameters):
        return ctx.constant(list(leaves(operands)))
    return _make(ctx, parameters, [value.shape for value in values if isinstance(value, Plain)])


def _make(ctx: Context, parameters: Sequence[Parameter], positions: Sequence[Shape | None]) -> Value:
    """Parameters that meet positions: along an axis that has none, their entries are new features."""
    if any(shape is None for shape in positions):
        raise ctx.error("it combines parameters with a tensor of unknown size")
    known = [shape for shape in positions if shape is not None]
    full = broadcast_shape([*known, *(parameter.shape for parameter in parameters)])
    covered = broadcast_shape([*known, (1,) * len(full)])
    free = [axis for axis, size in enumerate(full) if covered[axis] != size]
    if len(free) > 1:
        raise ctx.error("its parameters have entries along several axes that the input has not")
    ctx.positional(parameters)
    if not free:
        return Plain(full)
    made = Features(ctx.fresh(full[free[0]]), (free[0],), full)
    for parameter in parameters:
        _write(ctx, made, parameter)
    return made


def broadcast_shape(shapes: Sequence[Shape]) -> Shape:
    """The sizes that tensors have together, aligned at their last axes."""
    rank = max(map(len, shapes), default=0)
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(max(sizes, key=lambda size: (size != 1, size)) for sizes in zip(*padded, strict=True))


def broadcast_all(ctx: Context, operands: Sequence[Any]) -> Features:
    """Align all operands with the one that has the most features.

    Returns:
        The features of all, on the axes of the result.
    """
    features = [value for value in operands if isinstance(value, Features)]
    largest = max(features, key=lambda value: (value.ids.size, value.rank))
    shapes = [value.shape for value in operands if isinstance(value, (Features, Plain)) and value.shape is not None]
    ranks = [len(value.shape) for value in operands if isinstance(value, Parameter)]
    shape = broadcast_shape([*shapes, (1,) * max(ranks, default=0)])
    axes = tuple(axis + len(shape) - largest.rank for axis in largest.axes)
    together = replace(largest, axes=axes, shape=shape)
    for value in operands:
        if value is not largest:
            broadcast(ctx, together, value)
    return together


def broadcast(ctx: Context, x: Features, other: Any) -> None:
    """Another operand is aligned with ``x`` at their last axes; it has no more features than ``x``."""
    if isinstance(other, Features):
        _tie(ctx, x, other)
    elif isinstance(other, Parameter):
        _write(ctx, x, other)
    elif isinstance(other, Joined):
        raise ctx.error("it combines them with several parameters end to end")
    elif isinstance(other, Plain):
        if other.shape is None:
            ctx.pin(x, f"{_where(ctx)} combines them with a tensor that holds no features")
            return
        _fix(ctx, x, other)


def _fix(ctx: Context, x: Features, other: Plain | Parameter) -> None:
    """The features keep the order in which those of another operand come."""
    varying = tuple(axis for axis in x.axes if _size(other, axis - x.rank) != 1)
    if varying:
        fix_inner(ctx, x, varying, f"{_where(ctx)} combines them with a tensor that holds no features")


def _tie(ctx: Context, first: Features, second: Features) -> None:
    axes = {axis - first.rank for axis in first.axes}
    others = {axis - second.rank for axis in second.axes}
    if second.ids.size == 1 and first.ids.size > 1:
        ctx.pin(second, f"{_where(ctx)} spreads it over several features")  # wherever that one was taken from
        return
    if not others <= axes:
        raise ctx.error("the features of its two inputs are not on the same axis")
    if any(_size(second, axis) != 1 for axis in axes - others):
        raise ctx.error("the features of one of its inputs meet positions of the other")
    kept = tuple(axis for axis in first.axes if axis - first.rank in others)
    ctx.tie(units_along(ctx, first, kept), second.ids)


def _write(ctx: Context, x: Features, parameter: Parameter) -> None:
    """The parameter's axis under a feature axis has one entry per feature; that under heads one per head."""
    if not parameter.counts:
        return _fix(ctx, x, parameter)
    own = [axis - x.rank for axis in range(x.rank) if axis not in x.axes]
    if any(_size(parameter, axis) not in (1, x.shape[axis]) for axis in own) or len(parameter.shape) > x.rank:
        raise ctx.error(f"`{parameter.name}` has entries along an axis that its other input has not")
    ctx.positional(parameter)
    varying = tuple(axis for axis in x.axes if _size(parameter, axis - x.rank) != 1)
    if not varying:
        return None
    if varying[1:] or varying[0] != x.axes[0]:
        if not parameter.constant:
            raise ctx.error(f"it gives `{parameter.name}` to the features of several heads")
        return _fix(ctx, x, parameter)
    axis = varying[0] - x.rank + len(parameter.shape)
    ctx.write(parameter, axis, x if len(x.axes) == 1 else units_along(ctx, x, varying))
    return None


def _size(value: Value, axis: int) -> int:
    """The size of an axis, counted from the back; 1 where the value has none there."""
    assert value.shape is not None
    return value.shape[axis] if -axis <= len(value.shape) else 1


def _where(ctx: Context) -> str:
    return f"`{ctx.node.name}`"
