"""Tensors that are computed from parameters alone, such as normalized weights and resampled position tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.values import Entries, Features, Parameter, Shape, parts_of


def broadcast_shape(shapes: Sequence[Shape]) -> Shape:
    """Return the broadcast shape of several shapes, aligned at their last axes."""
    rank = max(map(len, shapes), default=0)
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(max(sizes, key=lambda size: (size != 1, size)) for sizes in zip(*padded, strict=True))


def combined(parameters: Sequence[Parameter]) -> Parameter:
    """Return the tensor whose entries are computed from the corresponding entries of several parameters."""
    shape = broadcast_shape([parameter.shape for parameter in parameters])
    if len(parameters) == 1:
        return parameters[0]
    found = [[part for part in parameters if _size(part, axis - len(shape)) > 1] for axis in range(len(shape))]
    entries = [
        together([part.along(axis - len(shape) + len(part.shape)) for part in parts])
        for axis, parts in enumerate(found)
    ]
    return computed(parameters, shape, entries)


def computed(parameters: Sequence[Parameter], shape: Shape, entries: Sequence[Entries | None]) -> Parameter:
    """Return the value of a tensor that is computed from parameters.

    Args:
        parameters: the parameters.
        shape: the shape of the tensor.
        entries: for each of its axes, the entries of parameters along it; ``None`` if they are unknown.
    """
    made_of = tuple({part.name: part for parameter in parameters for part in parts_of(parameter)}.values())
    return Parameter(
        parameters[0].name,
        tuple(shape),
        (None,) * len(shape),
        counts=math.prod(shape) > 1 and any(parameter.counts for parameter in parameters),
        constant=all(parameter.constant for parameter in parameters),
        entries=tuple(entries),
        made_of=made_of,
    )


def together(found: Sequence[Entries | None]) -> Entries | None:
    """Return entries that belong together one by one; ``None`` if some are unknown."""
    known = [entries for entries in found if entries is not None]
    if not known or len(known) < len(found):
        return None
    first, *others = known
    return replace(first, also=(*first.also, *others))


def with_axes(parameter: Parameter, shape: Shape, shown: Sequence[int | None]) -> Parameter:
    """Return a tensor that is computed from another, position by position.

    Args:
        parameter: the other tensor.
        shape: the shape of the result.
        shown: for each axis of the result, the axis of the other tensor that has the same entries; ``None`` if there
            is none.
    """
    return computed([parameter], shape, [None if axis is None else parameter.along(axis) for axis in shown])


def as_features(ctx: Context, parameter: Parameter, axis: int) -> Features:
    """Return new features along one axis of a parameter. Its entries along all other axes are positions."""
    axis %= len(parameter.shape)
    made = Features(ctx.fresh(parameter.shape[axis]), (axis,), parameter.shape)
    ctx.write(parameter, axis, made)
    return made


def _size(parameter: Parameter, axis: int) -> int:
    """Return the size of an axis, counted from the back; 1 if the parameter does not have the axis."""
    return parameter.shape[axis] if -axis <= len(parameter.shape) else 1
