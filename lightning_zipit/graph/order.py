"""Dependencies between the nodes of a graph: ancestors, descendants and constants."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx


def descendants(roots: set[fx.Node], nodes: list[fx.Node]) -> set[fx.Node]:
    """Return the roots, and all nodes that depend on them."""
    found = set(roots)
    for node in nodes:
        if node in found or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def ancestors(leaves: set[fx.Node], nodes: list[fx.Node]) -> set[fx.Node]:
    """Return the leaves, and all nodes that they depend on."""
    found = set(leaves)
    for node in reversed(nodes):
        if node in found:
            found.update(node.all_input_nodes)
    return found


def varying(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes that depend on the input. All others are parameters, or computed only from parameters."""
    nodes = list(nodes)
    return descendants({node for node in nodes if node.op == "placeholder"}, nodes)


def with_constants(chosen: set[fx.Node], nodes: list[fx.Node]) -> set[fx.Node]:
    """Return the nodes of a part that depend on the input, and the constant nodes that they read.

    A parameter that two parts read belongs to both, so that neither passes it to the other.

    Args:
        chosen: the nodes of the part. Constant nodes that no other node of the part reads are dropped.
        nodes: all nodes of the graph in order.
    """
    depending = varying(nodes)
    found = chosen & depending
    for node in reversed(nodes):
        if node not in depending and not found.isdisjoint(node.users):
            found.add(node)
    return found
