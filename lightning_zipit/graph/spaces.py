"""What tracing produces: feature spaces, taps, crossings, and the graph that everything downstream works from."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import rich.table
import torch
from rich.console import Console
from torch import Tensor, fx

from lightning_zipit.graph.order import with_constants
from lightning_zipit.graph.table import AxisRef, Block, Row


@dataclass(frozen=True)
class Tap:
    """Where the activations of a space are measured.

    Attributes:
        node: name of the graph node whose output is measured.
        axes: the axes that hold the features.
        block: the entries along them that are this space, or that its projections read.
        reader: for people: the module that reads the tensor there.
        projections: rows of weights that give the features, where the measured tensor is what a projection inside
            attention reads; queries and keys are two projections of one space.
        also: where the same features are measured, too, as a layer that makes or reads them is applied several times:
            samples of all places count alike.
    """

    node: str
    axes: tuple[int, ...]
    block: Block
    reader: str
    projections: tuple[Projection, ...] = ()
    also: tuple[Tap, ...] = ()

    @property
    def key(self) -> str:
        """A name for what is measured: taps that read the same entries of the same nodes have the same."""
        measured = [(tap.node, tap.block.starts, tap.block.repeat) for tap in (self, *self.also)]
        return f"{self.node}-{hashlib.blake2b(repr(measured).encode(), digest_size=6).hexdigest()}"

    def features(self, value: Tensor) -> Tensor:
        """The measured tensor as ``(features, batch, …)``; the positions of a sample follow, a view where it can be."""
        first = value.movedim(self.axes, tuple(range(len(self.axes)))).flatten(0, len(self.axes) - 1)
        if self.block.starts == range(len(first)) and self.block.repeat == 1:
            return first
        chosen = first[self.block.entries().to(value.device)]  # (features, repeat, batch, …)
        return chosen.squeeze(1) if self.block.repeat == 1 else chosen.movedim(1, -1)


@dataclass(frozen=True)
class Projection:
    """Features as rows of a weight: feature k is row ``rows[k]``."""

    weight: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class FeatureSpace:
    """A set of axes that must be merged together.

    Attributes:
        name: the module that writes it first.
        size: how many features it has.
        producers: parameter and axis of everything that writes it.
        consumers: parameter and axis of everything that reads it.
        tap: where it is measured; ``None`` where nothing reads it, and for units, which are matched by their members.
        pinned: why its features are matched by their number: they mean the same in all models, as those that are tied
            to the network's input or output do. Empty where they are matched by what they do.
        units: the space of the groups or heads that its features belong to. They are matched as wholes, and features
            then within them; ``None`` where there are none.
        unit_of: the unit of each feature, empty where there are none.
    """

    name: str
    size: int
    producers: tuple[tuple[str, int], ...]
    consumers: tuple[tuple[str, int], ...]
    tap: Tap | None
    pinned: str = ""
    units: str | None = None
    unit_of: tuple[int, ...] = ()


@dataclass(frozen=True)
class Crossing:
    """A value that passes from the trunk to the heads, or from a stem to the trunk.

    Attributes:
        node: name of the graph node that makes it.
        axis: which of its axes holds features; ``None`` where it holds none, or they pass by the trunk.
        ref: the spaces along that axis.
        absorbed: whether the head's first layers read it through their weights; else the head starts by unmerging it.
        shape: the sizes that it has for one sample, of a tensor that a stem hands over.
    """

    node: str
    axis: int | None = None
    ref: AxisRef | None = None
    absorbed: bool = False
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class MergeGraph:
    """A traced backbone: its feature spaces, its table of axes, and where trunk ends and heads begin.

    Attributes:
        spaces: the feature spaces of the trunk by name.
        axes: for each parameter and buffer, per axis, the spaces that it writes or reads; ``None`` leaves the axis
            alone. Parameters of heads have entries where they read a space of the trunk. A tied tensor has a row for
            every name, and the row of the trunk where both trunk and heads use it.
        head_axes: the rows of the parameters and buffers that the heads use, as the heads use them.
        crossings: what the heads take from the trunk, in order; what they take from a stem comes last.
        trunk_nodes: names of the graph nodes of the trunk.
        stop_at: the module that was asked for as the trunk's last; ``None`` zips down to the last layer.
        module: the traced backbone.
        fx_graph: its graph, as torch.fx recorded it.
        held: per node of the trunk, the spaces that its output holds.
        shapes: per node whose value is a tensor, the sizes of that, for a batch of a few samples.
        barriers: nodes that, with all that depends on them, stay in the heads where the trunk would have held them,
            and why.
        notes: for people: what is not merged by what it does, and why.
        input_shape: the shape of one sample of the input that the sizes come from.
        start_at: the module that was asked for as the trunk's first; ``None`` zips from the input on.
        stem_nodes: names of the graph nodes of the stem, which stays a part of each task's own.
        entries: what the trunk takes from a stem, in order; none where it starts at the input.
    """

    spaces: dict[str, FeatureSpace]
    axes: dict[str, Row]
    crossings: tuple[Crossing, ...]
    trunk_nodes: frozenset[str]
    stop_at: str | None
    module: torch.nn.Module = field(repr=False)
    fx_graph: fx.Graph = field(repr=False)
    held: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    barriers: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    input_shape: tuple[int, ...] = ()
    start_at: str | None = None
    stem_nodes: frozenset[str] = frozenset()
    entries: tuple[Crossing, ...] = ()
    head_axes: dict[str, Row] = field(default_factory=dict, repr=False)

    def to_table(self) -> rich.table.Table:
        """The table of axes for people: one row a parameter, one column an axis (``→`` writes, ``←`` reads)."""
        rank = max((len(refs) for refs in self.axes.values()), default=0)
        table = rich.table.Table(title=f"{len(self.spaces)} feature spaces")
        for heading in ("parameter", *(f"axis {axis}" for axis in range(rank))):
            table.add_column(heading, overflow="fold")
        for name, refs in self.axes.items():
            if any(refs):
                table.add_row(name, *(str(ref) if ref else "·" for ref in refs))
        table.caption = "\n".join(self.notes) or None
        table.caption_justify = "left"
        return table

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=200).print(self.to_table())
        return buffer.getvalue()

    def to_dot(self) -> str:
        """The network in Graphviz's language, in the colours of its spaces."""
        from lightning_zipit.graph.draw import to_dot

        return to_dot(self)

    def to_svg(self) -> str:
        """The network as a picture, in the colours of its spaces; a notebook shows it by itself."""
        from lightning_zipit.graph.draw import to_svg

        return to_svg(self)

    _repr_svg_ = to_svg

    def trunk_graph(self) -> Iterator[fx.Node]:
        """The nodes of the trunk in order of execution."""
        return (node for node in self.fx_graph.nodes if node.name in self.trunk_nodes)

    def stem_graph(self) -> Iterator[fx.Node]:
        """The nodes of the stem in order of execution."""
        return (node for node in self.fx_graph.nodes if node.name in self.stem_nodes)

    def head_graph(self) -> Iterator[fx.Node]:
        """The nodes of the head in order of execution, the last of which is the output.

        Parameters that the trunk reads too are among them: the head has its own.
        """
        nodes = list(self.fx_graph.nodes)
        shared = self.trunk_nodes | self.stem_nodes
        own = {node for node in nodes if node.name not in shared}
        own |= with_constants(own, nodes)
        return (node for node in nodes if node in own)


def unit_members(space: FeatureSpace) -> Tensor:
    """The features of each unit, ``(units, features)``."""
    order = torch.tensor(space.unit_of).argsort(stable=True)
    return order.reshape(max(space.unit_of) + 1, -1)


def handed_over(graph: MergeGraph) -> set[str]:
    """The spaces that stems write."""
    return {space for entry in graph.entries if entry.ref is not None for space in entry.ref.spaces}


def units_first(graph: MergeGraph) -> list[str]:
    """The names of all spaces, those of units before those of their members."""
    return sorted(graph.spaces, key=lambda name: len(units_around(graph, name)))


def units_around(graph: MergeGraph, name: str) -> list[str]:
    """The spaces of the units that the features of a space belong to, of the units of those, and so on."""
    around = []
    while (units := graph.spaces[name].units) is not None:
        around.append(units)
        name = units
    return around
