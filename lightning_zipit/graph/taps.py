"""Taps: the points where features are measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from lightning_zipit.graph.events import Event
from lightning_zipit.graph.registry import Trait, traits_of
from lightning_zipit.graph.spaces import FeatureSpace, MergeGraph, Tap


def before_activations(graph: MergeGraph) -> MergeGraph:
    """Move the taps of a graph in front of the activation functions that precede them.

    Args:
        graph: a merge graph; it is not changed.

    Returns:
        A graph of the same spaces. A tap moves back through pointwise operators. A tap after any other operator, such
        as max pooling or a norm, or after a stem, does not move. Neither does a tap of projections inside attention.

    Example:
        >>> from torch import nn
        >>> from lightning_zipit import trace
        >>> graph = trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> graph.spaces["0"].tap.node, before_activations(graph).spaces["0"].tap.node
        ('_1', '_0')
    """
    nodes = {node.name: node for node in graph.fx_graph.nodes}

    def moved(space: FeatureSpace) -> FeatureSpace:
        if space.tap is None:
            return space
        return replace(space, tap=measured_once([in_front(tap) for tap in (space.tap, *space.tap.also)]))

    def in_front(tap: Tap) -> Tap:
        node: fx.Node = nodes[tap.node]
        while not tap.projections and node.name in graph.trunk_nodes:
            # A second input may be a bound or an exponent per feature, so the operator differs between features.
            if Trait.POINTWISE not in traits_of(node, graph.module) or len(node.all_input_nodes) > 1:
                break
            node = node.all_input_nodes[0]
        return replace(tap, node=node.name)

    return replace(graph, spaces={name: moved(space) for name, space in graph.spaces.items()})


def measured_once(taps: Sequence[Tap]) -> Tap:
    """Combine several taps of a space into one, without duplicates."""
    places: dict[tuple[str, str], Tap] = {}
    for tap in taps:
        places.setdefault((tap.node, str(tap.block)), replace(tap, also=()))
    first, *others = places.values()
    return replace(first, also=tuple(others))


def find_repeated(events: Sequence[Event]) -> list[Event]:
    """Find the events of parameters that are applied several times: they write or read at several nodes."""
    places: dict[tuple[str, int, str], set[fx.Node | None]] = defaultdict(set)
    for event in events:
        reads = event.kind == "consumer" and event.value is not None
        places[event.name, event.axis, event.kind].add(event.value.node if reads and event.value else event.node)
    kinds = ("producer", "consumer")
    return [each for each in events if each.kind in kinds and len(places[each.name, each.axis, each.kind]) > 1]


def tapped_by_all(graphs: Sequence[MergeGraph]) -> MergeGraph:
    """Combine the taps of several graphs of one network, so that one calibration measures all of them.

    Args:
        graphs: merge graphs with different ends of the trunk, or different taps; they are not changed.

    Returns:
        A graph for calibration, not for merging. It has the spaces of the first graph, the spaces of the others with
        other taps, and the trunk nodes of all.

    Example:
        >>> from torch import nn
        >>> from lightning_zipit import trace
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [space.tap.node for space in tapped_by_all([trace(net, "0"), trace(net)]).spaces.values()]
        ['_0', '_1', '_3']
    """
    spaces = dict(graphs[0].spaces)
    known = {space.tap.key for space in spaces.values() if space.tap is not None}
    for graph in graphs[1:]:
        for name, space in graph.spaces.items():
            if space.tap is not None and space.tap.key not in known:
                known.add(space.tap.key)
                spaces[f"{name} at {space.tap.key}"] = space
    return replace(
        graphs[0],
        spaces=spaces,
        trunk_nodes=frozenset().union(*(graph.trunk_nodes for graph in graphs)),
        stem_nodes=frozenset().union(*(graph.stem_nodes for graph in graphs)),
        entries=tuple({entry.node: entry for graph in graphs for entry in graph.entries}.values()),
    )
