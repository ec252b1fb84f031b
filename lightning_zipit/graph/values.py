"""What tracing knows of a value: which of a tensor's axes hold features, and which features those are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import fx

Ids: TypeAlias = npt.NDArray[np.int64]
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Plain:
    """A tensor without features that can be merged, such as the network's input; the shape may not be known."""

    shape: Shape | None = None


@dataclass(frozen=True)
class Opaque:
    """What an operator without a rule returned; ``ids`` are the features that went into it."""

    ids: Ids


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer, or a view of one.

    Attributes:
        name: its name in the backbone; the first one of a tied tensor.
        shape: the sizes of the view.
        axes: per axis of the view, the whole axis of the parameter that it is; ``None`` where it is none.
        path: the name by which the forward reads it.
        counts: whether its entries could come in another order: they are several, and no whole numbers.
        constant: whether it is a buffer, whose entries the code has put in the same order in all models.
    """

    name: str
    shape: Shape
    axes: tuple[int | None, ...]
    path: str = ""
    counts: bool = True
    constant: bool = False


@dataclass(frozen=True)
class Joined:
    """Parameters end to end along their first axis, as the biases of queries, keys and values are at times."""

    parts: tuple[Parameter, ...]


@dataclass(frozen=True, eq=False)
class Features:
    """A tensor with features along one axis, or along several (heads and the features of each).

    Attributes:
        ids: the features, one axis for each of ``axes``; a feature may come several times, as H·W neighbours do after
            a flatten.
        axes: the axes that hold them, counted from the front and in order.
        shape: the tensor's sizes; a rule may leave it out, as it is known from the graph.
        node: the node of the traced graph that made the tensor.
    """

    ids: Ids
    axes: tuple[int, ...]
    shape: Shape = ()
    node: fx.Node | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def positions(self) -> Shape:
        """The sizes of all axes but the first and those of the features."""
        return tuple(size for axis, size in enumerate(self.shape) if axis and axis not in self.axes)


Value: TypeAlias = "Features | Parameter | Plain"


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


def parts_of(value: Any) -> tuple[Parameter, ...]:
    """The parameters that a value is made of; none where it is none."""
    if isinstance(value, Joined):
        return value.parts
    return (value,) if isinstance(value, Parameter) else ()
