"""Which nodes of a graph depend on which: what comes before and after, and what depends on no input."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx


def descendants(roots: set[fx.Node], nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes, and all that depends on them."""
    found = set(roots)
    for node in nodes:
        if node in found or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def ancestors(leaves: set[fx.Node], nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes, and all that they depend on."""
    found = set(leaves)
    for node in reversed(nodes):
        if node in found:
            found.update(node.all_input_nodes)
    return found


def varying(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on the input; the others are parameters, and what is computed from these alone."""
    nodes = list(nodes)
    return descendants({node for node in nodes if node.op == "placeholder"}, nodes)


def with_constants(chosen: set[fx.Node], nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes of a part that depend on the input, and those that they read which do not.

    A parameter that two parts read is in both: neither hands it over to the other.

    Args:
        chosen: the part; nodes that do not depend on the input are dropped where nothing of the part reads them.
        nodes: the whole graph in order.
    """
    depending = varying(nodes)
    found = chosen & depending
    for node in reversed(nodes):
        if node not in depending and not found.isdisjoint(node.users):
            found.add(node)
    return found
