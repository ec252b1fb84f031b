"""The declarative table that tracing produces and everything downstream works from."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx

Role = Literal["producer", "consumer"]


@dataclass(frozen=True)
class Block:
    """The entries of an axis that hold one feature space, feature after feature.

    Attributes:
        space: name of the feature space.
        starts: the first entry of each feature, ``range`` where they are evenly spaced.
        repeat: how many neighbouring entries each feature has (H·W after a flatten, else 1).
    """

    space: str
    starts: range | tuple[int, ...]
    repeat: int = 1

    @property
    def size(self) -> int:
        """How many features there are."""
        return len(self.starts)

    @property
    def contiguous(self) -> bool:
        """Whether its entries are neighbours in order, with nothing between them."""
        return isinstance(self.starts, range) and (self.size == 1 or self.starts.step == self.repeat)

    def entries(self) -> Tensor:
        """Indices along the axis, ``(features, repeat)``."""
        return torch.as_tensor(self.starts, dtype=torch.int64)[:, None] + torch.arange(self.repeat)

    def __str__(self) -> str:
        if isinstance(self.starts, range) and self.starts.step == self.repeat:
            where = f"[{self.starts.start}:{self.starts.stop}]"
        elif isinstance(self.starts, range):
            where = f"[{self.starts.start}:{self.starts.stop}:{self.starts.step}]"
        else:
            where = "[permuted]"
        return f"{self.space}{where}" + (f"×{self.repeat}" if self.repeat > 1 else "")


@dataclass(frozen=True)
class AxisRef:
    """What one axis of a parameter, or of a measured tensor, holds.

    Attributes:
        blocks: the spaces along the axis; entries outside all blocks hold no feature that is merged.
        role: whether the axis writes the spaces or reads them.
        size: how many entries it holds, those of all groups.
        groups: of a grouped convolution, whose axis 1 holds in the rows of each group the entries of that group only;
            its length is then ``size / groups``.
    """

    blocks: tuple[Block, ...]
    role: Role
    size: int
    groups: int = 1

    @property
    def whole(self) -> bool:
        """Whether the axis is one space, entry by entry in order."""
        return len(self.blocks) == 1 and self.blocks[0].starts == range(self.size) and self.blocks[0].repeat == 1

    @property
    def spaces(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(block.space for block in self.blocks))

    def resized(self, widths: Mapping[str, int]) -> AxisRef:
        """The same axis of a network whose spaces have other numbers of features: the same blocks in the same order.

        Args:
            widths: per space its number of features; spaces that are left out keep theirs. The blocks of one that is
                resized must be contiguous.
        """
        growth = [(widths.get(block.space, block.size) - block.size) * block.repeat for block in self.blocks]
        if not any(growth):
            return self
        blocks = []
        for block, extra in zip(self.blocks, growth, strict=True):
            starts = self._behind_growth(torch.as_tensor(block.starts), growth).numpy()
            if extra:
                starts = starts[0] + np.arange(widths[block.space]) * block.repeat
            blocks.append(replace(block, starts=as_starts(starts)))
        return replace(self, blocks=tuple(blocks), size=self.size + sum(growth))

    def _behind_growth(self, entries: Tensor, growth: Sequence[int]) -> Tensor:
        """Where entries lie once blocks have grown at their ends."""
        moved = entries.clone()
        for block, extra in zip(self.blocks, growth, strict=True):
            moved += extra * (entries > block.starts[0])
        return moved

    def index(self, tables: Mapping[str, Tensor], resized: AxisRef | None = None) -> Tensor:
        """Per entry of the axis, the entry that a per-space index table sends it to, ``(size,)``.

        Args:
            tables: per space an int64 vector ``(features,)`` with values among the features that it leads to.
            resized: the axis that it leads to, where that has another size.
        """
        index, blocks = torch.arange(self.size), self.blocks
        if resized is not None and resized is not self:
            blocks = resized.blocks
            growth = [(new.size - old.size) * old.repeat for new, old in zip(blocks, self.blocks, strict=True)]
            index = self._behind_growth(index, growth)
        for block, new in zip(self.blocks, blocks, strict=True):
            index[block.entries()] = new.entries()[tables[block.space]]
        return index

    def along(self, values: Tensor, weight: Tensor, axis: int) -> Tensor:
        """Values per entry ``(size,)``, spread so that they broadcast with the weight whose axis this is."""
        if self.groups == 1:
            return values.reshape(-1, *[1] * (weight.ndim - axis - 1)).to(weight.device)
        rows = values.reshape(self.groups, -1).repeat_interleave(weight.shape[0] // self.groups, 0)
        return rows.reshape(len(rows), -1, *[1] * (weight.ndim - 2)).to(weight.device)

    def gather(self, weight: Tensor, axis: int, tables: Mapping[str, Tensor]) -> Tensor:
        """The weight whose entry k along the axis is entry ``index(tables)[k]`` of the given one."""
        index = self.index(tables).to(weight.device)
        if self.groups == 1:
            return weight.index_select(axis, index)
        within = self.along(index % (self.size // self.groups), weight, axis)
        return weight.gather(axis, within.expand_as(weight))

    def scatter_add(
        self, weight: Tensor, axis: int, tables: Mapping[str, Tensor], resized: AxisRef | None = None
    ) -> Tensor:
        """The weight in which entry ``index(tables, resized)[k]`` is the sum of the entries k of the given one."""
        resized = resized or self
        index = self.index(tables, resized).to(weight.device)
        if self.groups == 1:
            shape = (*weight.shape[:axis], resized.size, *weight.shape[axis + 1 :])
            return weight.new_zeros(shape).index_add_(axis, index, weight)
        within = self.along(index % (self.size // self.groups), weight, axis)
        return torch.zeros_like(weight).scatter_add_(axis, within.expand_as(weight), weight)

    def __str__(self) -> str:
        arrow = "→" if self.role == "producer" else "←"
        names = self.blocks[0].space if self.whole else " + ".join(map(str, self.blocks))
        return f"{arrow} {names}" + (f" in {self.groups} groups" if self.groups > 1 else "")


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
            alone. Head parameters have entries where they read a space of the trunk.
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
    axes: dict[str, tuple[AxisRef | None, ...]]
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

    def to_table(self) -> Table:
        """The table of axes for people: one row a parameter, one column an axis (``→`` writes, ``←`` reads)."""
        rank = max((len(refs) for refs in self.axes.values()), default=0)
        table = Table(title=f"{len(self.spaces)} feature spaces")
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
        """The nodes of the head in order of execution, the last of which is the output."""
        shared = self.trunk_nodes | self.stem_nodes
        return (node for node in self.fx_graph.nodes if node.name not in shared)


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


def as_starts(positions: np.ndarray) -> range | tuple[int, ...]:
    """Positions as a range where they are evenly spaced upwards."""
    if len(positions) == 1:
        return range(int(positions[0]), int(positions[0]) + 1)
    steps = np.diff(positions)
    step = int(steps[0])
    if step > 0 and (steps == step).all():
        return range(int(positions[0]), int(positions[0]) + step * len(positions), step)
    return tuple(int(position) for position in positions)
