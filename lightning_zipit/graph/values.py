"""Abstract values of tracing: the axes of a tensor that hold features, and these features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import fx

Ids: TypeAlias = npt.NDArray[np.int64]
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Plain:
    """A tensor without features to merge, such as the network's input.

    Attributes:
        shape: its shape; ``None`` if it is unknown.
        alike: axes along which all entries are known to be the same.
    """

    shape: Shape | None = None
    alike: tuple[int, ...] = ()


@dataclass(frozen=True)
class Opaque:
    """The output of an operator without a rule; ``ids`` are the features of its inputs."""

    ids: Ids


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer, a view of one, or a tensor that is computed from parameters alone.

    Attributes:
        name: its name in the backbone; for a tied tensor, the first name.
        shape: the shape of the view.
        axes: for each axis of the view, the axis of the parameter that it shows in full; ``None`` if there is none.
        path: the name by which the forward reads it.
        counts: whether the order of its entries may differ between models: it has several entries, and is not of an
            integer type.
        constant: whether it is a buffer. The code gives its entries the same order in all models.
        entries: for each axis, the entries of parameters that it shows; ``None`` if they are unknown, or if all are
            the same. Empty if ``axes`` says everything.
        made_of: the parameters that it is computed from; empty if it is a parameter itself, or a view of one.
    """

    name: str
    shape: Shape
    axes: tuple[int | None, ...]
    path: str = ""
    counts: bool = True
    constant: bool = False
    entries: tuple[Entries | None, ...] = ()
    made_of: tuple[Parameter, ...] = ()

    @property
    def rank(self) -> int:
        return len(self.shape)

    def along(self, axis: int) -> Entries | None:
        """Return the entries of parameters along an axis; ``None`` if they are unknown, or if all are the same."""
        if self.entries:
            return self.entries[axis]
        origin = self.axes[axis]
        if origin is None:
            return None
        size = self.shape[axis]
        return Entries(((self, origin, size),), np.zeros(size, np.int64), np.arange(size))


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of parameters along one axis of a tensor that is computed from them.

    Attributes:
        of: parameters, an axis of each, and its size.
        which: for each entry, its parameter in ``of``; -1 for an entry of none.
        rows: for each entry, its index along the axis of its parameter.
        also: entries of further parameters, such as the scale of a normalized weight. Entry k of all belongs together.
    """

    of: tuple[tuple[Parameter, int, int], ...]
    which: Ids
    rows: Ids
    also: tuple[Entries, ...] = ()

    def take(self, numbers: Ids) -> Entries:
        """Return some of the entries, in another order."""
        also = tuple(other.take(numbers) for other in self.also)
        return Entries(self.of, self.which[numbers], self.rows[numbers], also)

    def all(self) -> Iterator[Entries]:
        """Iterate over these entries, and those that belong to them."""
        yield self
        for other in self.also:
            yield from other.all()


def no_entries(size: int) -> Entries:
    """Return entries that belong to no parameter, such as those of a constant."""
    return Entries((), np.full(size, -1), np.zeros(size, np.int64))


def concatenated(parts: Sequence[Entries]) -> Entries:
    """Return the entries of several tensors, one after the other."""
    firsts = np.cumsum([0, *(len(part.of) for part in parts)]).tolist()
    which = [np.where(part.which < 0, -1, part.which + first) for part, first in zip(parts, firsts, strict=False)]
    depth = max(len(part.also) for part in parts)
    also = tuple(
        concatenated([part.also[k] if k < len(part.also) else no_entries(len(part.which)) for part in parts])
        for k in range(depth)
    )
    of = tuple(source for part in parts for source in part.of)
    return Entries(of, np.concatenate(which), np.concatenate([part.rows for part in parts]), also)


@dataclass(frozen=True, eq=False)
class Features:
    """A tensor with features along one axis, or along several (heads and the features of each).

    Attributes:
        ids: the features, one axis for each of ``axes``. A feature may occur several times, such as H·W times after a
            flatten.
        axes: the axes that hold the features, counted from the front and in order.
        shape: the shape of the tensor. A rule may omit it, because the graph knows it.
        node: the node of the traced graph that computes the tensor.
        alike: axes of positions along which all entries are known to be the same.
    """

    ids: Ids
    axes: tuple[int, ...]
    shape: Shape = ()
    node: fx.Node | None = None
    alike: tuple[int, ...] = ()

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
    if not isinstance(value, Parameter):
        return ()
    return value.made_of or (value,)
