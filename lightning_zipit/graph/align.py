"""What broadcasting and contraction tie: operands that meet axis by axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.values import Features, Ids, Parameter, Plain, Shape, Value


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


def broadcast_all(ctx: Context, operands: Sequence[Any]) -> Features:
    """Align all operands with the one that has the most features, which is returned."""
    largest = max((value for value in operands if isinstance(value, Features)), key=lambda value: value.ids.size)
    for value in operands:
        if value is not largest:
            broadcast(ctx, largest, value)
    return largest


def broadcast(ctx: Context, x: Features, other: Any) -> None:
    """Another operand is aligned with ``x`` at their last axes; it has no more features than ``x``."""
    if isinstance(other, Features):
        _tie(ctx, x, other)
    elif isinstance(other, Parameter):
        _write(ctx, x, other)
    elif isinstance(other, Plain):
        if other.shape is None:
            ctx.pin(x, f"{_where(ctx)} combines them with a tensor that holds no features")
            return
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
    varying = tuple(axis for axis in x.axes if _size(parameter, axis - x.rank) != 1)
    if not varying:
        return
    outer, inner = varying[0], tuple(axis for axis in varying if axis != x.axes[0])
    axis = outer - x.rank + len(parameter.shape)
    if len(x.axes) == 1:
        ctx.write(parameter, axis, x)
        return
    if outer == x.axes[0]:
        ctx.write(parameter, axis, units_along(ctx, x, (outer,)))
    if inner:
        fix_inner(ctx, x, inner, f"{_where(ctx)} gives `{parameter.name}` to the features of every head alike")


def _size(value: Value, axis: int) -> int:
    """The size of an axis, counted from the back; 1 where the value has none there."""
    assert value.shape is not None
    return value.shape[axis] if -axis <= len(value.shape) else 1


def _where(ctx: Context) -> str:
    return f"`{ctx.node.name}`"


def contract(ctx: Context, letters: tuple[str, str], output: str, operands: tuple[Value, Value]) -> Value:
    """A product of two tensors that is summed over the letters that are not in ``output``, as in ``torch.einsum``."""
    first, second = operands
    if isinstance(second, Features) and not (isinstance(first, Features) and first.ids.size >= second.ids.size):
        first, second, letters = second, first, letters[::-1]
    if not isinstance(first, Features):
        return Plain()
    own, others = letters
    if isinstance(second, Parameter):
        return _contract_parameter(ctx, own, others, output, first, second)
    if not isinstance(second, Features):
        meeting = tuple(axis for axis in first.axes if own[axis] in others)
        if meeting:
            fix_inner(ctx, first, meeting, f"{_where(ctx)} multiplies them with a tensor that holds no features")
    else:
        shared = [own[axis] for axis in first.axes if own[axis] in others]
        held = [others[axis] for axis in second.axes]
        if sorted(shared) != sorted(held):
            raise ctx.error("the features of one of its inputs meet positions of the other")
        units = units_along(ctx, first, tuple(axis for axis in first.axes if own[axis] in others))
        ctx.tie(units, second.ids.transpose([held.index(letter) for letter in shared]))
        ctx.observe(first)
        ctx.observe(second)
    ids = mix(ctx, first, {axis for axis in first.axes if own[axis] not in output})
    if ids is None:
        return Plain()
    kept = [own[axis] for axis in first.axes if own[axis] in output]
    axes = sorted(output.index(letter) for letter in kept)
    order = [kept.index(output[axis]) for axis in axes]
    return Features(ids.transpose(order), tuple(axes), _sizes(letters, output, (first, second)))


def _contract_parameter(ctx: Context, own: str, others: str, output: str, x: Features, weight: Parameter) -> Value:
    if len(x.axes) != 1:
        raise ctx.error("it multiplies features along several axes with a parameter")
    letter = own[x.axes[0]]
    shape = _sizes((own, others), output, (x, weight))
    if letter in output:
        if letter in others:
            ctx.write(weight, others.index(letter), x)
        return Features(x.ids, (output.index(letter),), shape)
    if letter not in others:
        raise ctx.error("it sums over the features")
    made = [name for name in others if name in output and name not in own]
    if len(made) != 1:
        raise ctx.error("the parameter has no single axis of new features")
    ctx.read(weight, others.index(letter), x)
    features = Features(ctx.fresh(weight.shape[others.index(made[0])]), (output.index(made[0]),), shape)
    ctx.write(weight, others.index(made[0]), features)
    return features


def _sizes(letters: tuple[str, str], output: str, operands: tuple[Value, Value]) -> Shape:
    sizes: dict[str, int] = {}
    for names, operand in zip(letters, operands, strict=True):
        for name, size in zip(names, operand.shape or (), strict=False):
            sizes[name] = max(size, sizes.get(name, 1))
    return tuple(sizes[name] for name in output)
