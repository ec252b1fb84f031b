"""Abstract values of tracing: the axes of a tensor that hold features, and these features."""

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
    """A tensor without features to merge, such as the network's input. The shape may be unknown."""

    shape: Shape | None = None


@dataclass(frozen=True)
class Opaque:
    """The output of an operator without a rule; ``ids`` are the features of its inputs."""

    ids: Ids


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer, or a view of one.

    Attributes:
        name: its name in the backbone; for a tied tensor, the first name.
        shape: the shape of the view.
        axes: for each axis of the view, the axis of the parameter that it shows in full; ``None`` if there is none.
        path: the name by which the forward reads it.
        counts: whether the order of its entries may differ between models: it has several entries, and is not of an
            integer type.
        constant: whether it is a buffer. The code gives its entries the same order in all models.
    """

    name: str
    shape: Shape
    axes: tuple[int | None, ...]
    path: str = ""
    counts: bool = True
    constant: bool = False


@dataclass(frozen=True)
class Joined:
    """Parameters concatenated along their first axis, such as the biases of queries, keys and values."""

    parts: tuple[Parameter, ...]


@dataclass(frozen=True, eq=False)
class Features:
    """A tensor with features along one axis, or along several (heads and the features of each).

    Attributes:
        ids: the features, one axis for each of ``axes``. A feature may occur several times, such as H·W times after a
            flatten.
        axes: the axes that hold the features, counted from the front and in order.
        shape: the shape of the tensor. A rule may omit it, because the graph knows it.
        node: the node of the traced graph that computes the tensor.
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
        """The sizes of all axes except the batch axis and the feature axes."""
        return tuple(size for axis, size in enumerate(self.shape) if axis and axis not in self.axes)


Value: TypeAlias = "Features | Parameter | Plain"


def leaves(value: Any) -> Iterator[Any]:
    """Iterate over the leaves of nested tuples, lists, dicts and slices."""
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
    """Return the parameters in a value; empty if the value is not a parameter."""
    if isinstance(value, Joined):
        return value.parts
    return (value,) if isinstance(value, Parameter) else ()
