"""Records of rules: ordered uses of features, nested units, and features that no node holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import fx

from lightning_zipit.graph.values import Features, Ids

EventKind: TypeAlias = Literal["producer", "consumer", "reader", "crossing", "entry"]


@dataclass(frozen=True)
class Event:
    """An ordered use of features: an axis of a parameter, or a value that is read without weights.

    Attributes:
        name: the parameter, or the node that reads.
        axis: the axis of the parameter.
        entries: the feature of every entry.
        kind: ``"producer"`` or ``"consumer"`` for parameters, ``"reader"`` for operators without weights,
            ``"crossing"`` for values that pass to the heads, ``"entry"`` for values that come from a stem.
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
    """Units of features. Features can be reordered within their unit, and whole units can be reordered.

    Attributes:
        members: the features of each unit, ``(units, features)``.
        units: the features that represent the units, ``(units,)``.
        kind: plural name of the units for messages, ``"groups"`` or ``"heads"``.
        node: the operator that nests them.
    """

    members: Ids
    units: Ids
    kind: str
    node: fx.Node


@dataclass(frozen=True)
class Projected:
    """Features that no node of the graph holds, described as a linear function of a value.

    Attributes:
        ids: the features, one per row of the weight.
        value: the value that the weight is applied to.
        weight: the name of the weight, ``(features, inputs)``.
        start: the row of the first feature.
        node: the fused operator that computes them.
    """

    ids: Ids
    value: Features
    weight: str
    start: int
    node: fx.Node
