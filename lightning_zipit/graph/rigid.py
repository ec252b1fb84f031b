"""Spaces that cannot use dense maps, and layers whose batch norm can be folded."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from lightning_zipit.graph.layers import Layer, find_stops
from lightning_zipit.graph.registry import Trait, traits_of
from lightning_zipit.graph.spaces import MergeGraph

PASSING = Trait.POINTWISE | Trait.POOLING | Trait.REARRANGE | Trait.SUM | Trait.DIFFERENCE
"""Operators that preserve linear combinations of features, if activation functions are treated as linear."""


def find_rigid(graph: MergeGraph) -> dict[str, str]:
    """Find the spaces to which dense maps cannot be applied.

    Only layers, and batch norms right after a layer, write all other spaces. Their features reach the consumers only
    through activation functions, pooling, sums and concatenations. Activation functions are not linear; this is
    ignored, as in the paper of CCA Merge.

    Args:
        graph: the merge graph.

    Returns:
        The reasons by the names of the spaces.
    """
    folded = {str(stop.norm.target) for stop in find_folded(graph) if stop.norm is not None}
    grouping = {space.units for space in graph.spaces.values()}
    rigid: dict[str, str] = {}
    for name, space in graph.spaces.items():
        if space.units is not None or name in grouping:
            rigid[name] = "groups or heads"
    for node in graph.trunk_graph():
        why, made = _obstacle(node, graph, folded), graph.held.get(node.name, ())
        for name in made if why else ():
            rigid.setdefault(name, why)
        if Trait.SYMMETRIC in traits_of(node, graph.module):
            for name in (name for source in node.all_input_nodes for name in graph.held.get(source.name, ())):
                if name not in made:
                    rigid.setdefault(name, f"`{node.name}` reduces over features")
    for refs in graph.axes.values():
        for ref in refs:
            for name in ref.spaces if ref is not None and ref.groups > 1 else ():
                rigid.setdefault(name, "read in groups")
    for crossing in graph.crossings:
        if crossing.ref is not None and not crossing.absorbed:
            for block in crossing.ref.blocks:
                if block.repeat > 1:
                    rigid.setdefault(block.space, "flattened before the heads")
    return rigid


def rigid_note(graph: MergeGraph) -> tuple[str, ...]:
    """Return the note that lists the spaces where a matcher of dense maps matches one to one; empty if none."""
    reasons: dict[str, list[str]] = {}
    for name, why in find_rigid(graph).items():
        if graph.spaces[name].tap is not None and not graph.spaces[name].pinned:
            reasons.setdefault(why, []).append(f"`{name}`")
    listed = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    return (f"Matched one to one, because linear combinations of features cannot be used: {listed}.",) * bool(reasons)


def _obstacle(node: fx.Node, graph: MergeGraph, folded: set[str]) -> str:
    """Return the reason why the features that a node computes cannot be mixed; empty if they can."""
    name = str(node.target) if node.op == "call_module" else node.name
    traits = traits_of(node, graph.module)
    if node.op == "call_module":
        linear = Trait.LINEAR in traits
        if linear and getattr(graph.module.get_submodule(name), "groups", 1) > 1:
            return f"`{name}` is depthwise or grouped"
        if name in folded or (linear and any(graph.axes.get(f"{name}.weight", ()))):
            return ""
    bounded = Trait.POINTWISE in traits and len(node.all_input_nodes) > 1  # such as a bound per feature
    if traits & PASSING and Trait.PER_FEATURE not in traits and not bounded:
        return ""
    return f"`{name}` acts on each feature separately, or on all features"


def find_folded(graph: MergeGraph) -> Iterator[Layer]:
    """Find the layers of the trunk whose batch norm, right after the layer, can be folded into the layer."""
    for stop in find_stops(graph, graph.module, list(graph.trunk_graph())).stops:
        if isinstance(stop, Layer) and stop.norm is not None:
            ref = graph.axes.get(f"{stop.name}.weight", (None,))[0]
            if ref is not None and ref.whole:
                yield stop
