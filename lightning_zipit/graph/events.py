"""What rules say of features: who holds them in an order, which move as wholes, and which no node holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import fx

from lightning_zipit.graph.values import Features, Ids

EventKind: TypeAlias = Literal["producer", "consumer", "reader", "crossing", "entry"]


@dataclass(frozen=True)
class Event:
    """Something that holds features in an order: an axis of a parameter, or a value that is read where it is.

    Attributes:
        name: the parameter, or the node that reads.
        axis: the axis of the parameter.
        entries: the feature of every entry.
        kind: what it does with them; a reader has no weights, a crossing passes into the heads, and an entry
            comes from a stem.
        value: the tensor that is read.
        node: the node that reads or writes.
        groups: see :attr:`AxisRef.groups`.
        path: the name by which the node reads the parameter.
    """

    name: str
    axis: int
    entries: Ids
    kind: EventKind
    value: Features | None
    node: fx.Node
    groups: int = 1
    path: str = ""


@dataclass(frozen=True)
class Nesting:
    """Features that can be reordered within their unit, and across units only as far as whole units are.

    Attributes:
        members: the features of each unit, ``(units, features)``.
        units: the features that stand for the units, ``(units,)``.
        kind: for people: ``"groups"`` or ``"heads"``.
        node: the operator that nests them.
    """

    members: Ids
    units: Ids
    kind: str
    node: fx.Node


@dataclass(frozen=True)
class Projected:
    """Features that no node of the graph holds, as a linear function of a value.

    Attributes:
        ids: the features, one for each row of the weight.
        value: what the weight is applied to.
        weight: the parameter, ``(features, inputs)``.
        start: the row of the first of ``ids``.
        node: the operator that hides them.
    """

    ids: Ids
    value: Features
    weight: str
    start: int
    node: fx.Node
