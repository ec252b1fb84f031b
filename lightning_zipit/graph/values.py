"""What tracing knows of a value: which of a tensor's axes holds features, and which features those are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import fx

Ids: TypeAlias = npt.NDArray[np.int64]


class Batch:
    """The size of the batch axis: one value, :data:`BATCH`, that equals nothing but itself."""

    def __repr__(self) -> str:
        return "batch"


BATCH = Batch()
Dim: TypeAlias = "int | Batch | None"
"""A size: a number, the batch, or ``None`` where it depends on the input."""


@dataclass(frozen=True)
class Plain:
    """A tensor without features that can be merged, such as the network's input."""

    shape: tuple[Dim, ...] | None = None


@dataclass(frozen=True)
class Opaque:
    """What an operator without a rule returned; ``ids`` are the features that went into it."""

    ids: Ids


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer by its name in the backbone."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Features:
    """A tensor with features along one axis.

    Attributes:
        ids: the features, in order, ``(C,)``.
        axis: the axis that holds them, counted from the front.
        shape: the tensor's sizes.
        repeat: how many neighbouring entries of the axis each feature has: H·W after a flatten, ``None`` where that is
            not known yet.
        node: the node of the traced graph that made the tensor.
    """

    ids: Ids
    axis: int
    shape: tuple[Dim, ...]
    repeat: int | None = 1
    node: fx.Node | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def positions(self) -> tuple[Dim, ...]:
        """The sizes of the axes behind the feature axis."""
        return self.shape[self.axis + 1 :]

    def entries(self, repeat: int | None = None) -> Ids:
        """The feature of every entry along the axis."""
        return np.repeat(self.ids, repeat or self.repeat or 1)

    def with_shape(self, *shape: Dim, axis: int | None = None) -> Features:
        return replace(self, shape=tuple(shape), axis=self.axis if axis is None else axis)

    def with_positions(self, *sizes: Dim) -> Features:
        """The same features with other sizes behind the feature axis."""
        return self.with_shape(*self.shape[: self.axis + 1], *sizes)

    def with_ids(self, ids: Ids) -> Features:
        extent = len(ids) * self.repeat if self.repeat else None
        return replace(self, ids=ids, shape=(*self.shape[: self.axis], extent, *self.positions))


def product(sizes: tuple[Dim, ...]) -> int | None:
    """The product of sizes, ``None`` unless all are numbers."""
    numbers = [size for size in sizes if isinstance(size, int)]
    return math.prod(numbers) if len(numbers) == len(sizes) else None


def leaves(value: Any) -> Iterator[Any]:
    """Everything inside nested tuples, lists, dicts and slices."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value
