"""The result of tracing: the merge graph with its feature spaces, taps and crossings."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import rich.table
import torch
from rich.console import Console
from torch import Tensor, fx

from lightning_zipit.graph.capture import Captured
from lightning_zipit.graph.order import with_constants
from lightning_zipit.graph.table import AxisRef, Block, Row


@dataclass(frozen=True)
class Tap:
    """The point where the activations of a space are measured.

    Attributes:
        node: name of the graph node whose output is measured.
        axes: the axes that hold the features.
        block: the entries along these axes that belong to the space, or that its projections read.
        reader: human-readable name of the module that reads the tensor.
        projections: rows of weights that compute the features from the measured tensor, for projections inside
            attention. Queries and keys are two projections of one space.
        also: further taps of the same features, if a layer that writes or reads them is applied several times. Samples
            of all taps count equally.
    """

    node: str
    axes: tuple[int, ...]
    block: Block
    reader: str
    projections: tuple[Projection, ...] = ()
    also: tuple[Tap, ...] = ()

    @property
    def key(self) -> str:
        """Identifier of the measurement: taps of the same entries of the same nodes have the same key."""
        measured = [(tap.node, tap.block.starts, tap.block.repeat) for tap in (self, *self.also)]
        return f"{self.node}-{hashlib.blake2b(repr(measured).encode(), digest_size=6).hexdigest()}"

    def features(self, value: Tensor) -> Tensor:
        """Return the measured tensor as ``(features, batch, …)`` followed by positions; a view if possible."""
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
        name: the name of the first module that writes it.
        size: the number of features.
        producers: parameter and axis of everything that writes it.
        consumers: parameter and axis of everything that reads it.
        tap: the point where it is measured; ``None`` if nothing reads it, and for units, which are matched by their
            members.
        pinned: the reason why its features are matched by index: they mean the same in all models, such as features
            that are tied to the network's input or output. Empty if they are matched by activation.
        units: the space of the groups or heads that its features belong to. Units are matched first, then the features
            within matched units. ``None`` if the space has no units.
        unit_of: the unit of each feature; empty if the space has no units.
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
        node: name of the graph node that computes it.
        axis: the axis that holds features; ``None`` if it holds none, or the value bypasses the trunk.
        ref: the spaces along that axis.
        absorbed: whether the weights of the head's first layers absorb the unmerge matrices. Otherwise the head starts
            with an explicit unmerge.
        shape: the shape for one sample, if the value comes from a stem.
    """

    node: str
    axis: int | None = None
    ref: AxisRef | None = None
    absorbed: bool = False
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class MergeGraph:
    """A traced backbone: its feature spaces, its table of axes, and its division into stem, trunk and head.

    Attributes:
        spaces: the feature spaces of the trunk by name.
        axes: for each parameter and buffer, per axis, the spaces that it writes or reads; ``None`` if the axis holds no
            features. Parameters of heads have entries if they read a space of the trunk. A tied tensor has a row for
            every name. If both trunk and heads use it, it has the row of the trunk.
        head_axes: the rows of the parameters and buffers of the heads, according to their use in the heads.
        crossings: the values that pass from the trunk to the heads, in order, then those from a stem to the heads.
        trunk_nodes: names of the graph nodes of the trunk.
        stop_at: the requested last module of the trunk; ``None`` zips down to the last layer.
        module: the traced backbone.
        fx_graph: its graph, captured by torch.export; modules with a rule are one node each.
        held: per node of the trunk, the spaces that its output holds.
        shapes: per node whose value is a tensor, the shape of that tensor, for a small batch.
        barriers: nodes that stay in the heads with all that depends on them, although they come before the cut, and the
            reasons.
        notes: human-readable list of what is matched by index instead of by activation, or is not merged, with reasons.
        captured: the capture of the network, for the structure of its arguments and its output.
        start_at: the requested first module of the trunk; ``None`` zips from the input on.
        stem_nodes: names of the graph nodes of the stem, which stays per task.
        entries: the values that pass from a stem to the trunk, in order; empty if the trunk starts at the input.
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
    captured: Captured | None = field(default=None, repr=False)
    start_at: str | None = None
    stem_nodes: frozenset[str] = frozenset()
    entries: tuple[Crossing, ...] = ()
    head_axes: dict[str, Row] = field(default_factory=dict, repr=False)

    def to_table(self) -> rich.table.Table:
        """Format the table of axes: one row per parameter, one column per axis (``→`` writes, ``←`` reads)."""
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
        """Draw the network in Graphviz's DOT language, in the colors of its spaces."""
        from lightning_zipit.graph.draw import to_dot

        return to_dot(self)

    def to_svg(self) -> str:
        """Draw the network as SVG, in the colors of its spaces. Notebooks display it automatically."""
        from lightning_zipit.graph.draw import to_svg

        return to_svg(self)

    _repr_svg_ = to_svg

    def trunk_graph(self) -> Iterator[fx.Node]:
        """Iterate over the nodes of the trunk in order of execution."""
        return (node for node in self.fx_graph.nodes if node.name in self.trunk_nodes)

    def stem_graph(self) -> Iterator[fx.Node]:
        """Iterate over the nodes of the stem in order of execution."""
        return (node for node in self.fx_graph.nodes if node.name in self.stem_nodes)

    def head_graph(self) -> Iterator[fx.Node]:
        """Iterate over the nodes of the head in order of execution. The last one is the output.

        Parameters that the trunk reads too are included, because the head has its own copies.
        """
        nodes = list(self.fx_graph.nodes)
        shared = self.trunk_nodes | self.stem_nodes
        own = {node for node in nodes if node.name not in shared}
        own |= with_constants(own, nodes)
        return (node for node in nodes if node in own)


def unit_members(space: FeatureSpace) -> Tensor:
    """Return the features of each unit, ``(units, features)``."""
    order = torch.tensor(space.unit_of).argsort(stable=True)
    return order.reshape(max(space.unit_of) + 1, -1)


def handed_over(graph: MergeGraph) -> set[str]:
    """Return the names of the spaces that stems write."""
    return {space for entry in graph.entries if entry.ref is not None for space in entry.ref.spaces}


def units_first(graph: MergeGraph) -> list[str]:
    """Return the names of all spaces, with the spaces of units before the spaces of their members."""
    return sorted(graph.spaces, key=lambda name: len(units_around(graph, name)))


def units_around(graph: MergeGraph, name: str) -> list[str]:
    """Return the chain of unit spaces around a space: its units, the units of these, and so on."""
    around = []
    while (units := graph.spaces[name].units) is not None:
        around.append(units)
        name = units
    return around
