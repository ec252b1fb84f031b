"""Uses of parameters by the nodes of a graph, and conflicts between them: a tensor can be merged in one role only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from torch import fx, nn

from lightning_zipit.graph.events import Event
from lightning_zipit.graph.table import named_tensors
from lightning_zipit.graph.values import Ids

Use: TypeAlias = "dict[int, tuple[str, int, bytes]]"
"""Per axis with features: the role, the number of groups, and the features."""

Uses: TypeAlias = "dict[str, dict[fx.Node, Use]]"
"""The use of each parameter by each node. Keys are the names that the forward reads."""


def find_uses(module: nn.Module, nodes: Iterable[fx.Node], events: Iterable[Event], component: Ids) -> Uses:
    """Collect the uses of parameters by nodes.

    Args:
        module: the traced network.
        nodes: the nodes in the order of the graph.
        events: the events that their rules recorded.
        component: the index of the tied set of each feature.
    """
    uses: Uses = {}
    for node in nodes:
        if node.op == "call_module":  # a call without features in its input has no events
            for name in named_tensors(module.get_submodule(str(node.target))):
                uses.setdefault(f"{node.target}.{name}", {})[node] = {}
    for event in events:
        if event.kind in ("producer", "consumer"):
            use = uses.setdefault(event.path, {}).setdefault(event.node, {})
            use.setdefault(event.axis, (event.kind, event.groups, component[event.entries].tobytes()))
    return uses


def find_conflicts(uses: Uses, order: Mapping[fx.Node, int]) -> dict[str, fx.Node]:
    """Find the parameters that nodes use in different roles, and the first node whose use differs from earlier ones.

    Args:
        uses: see :func:`find_uses`.
        order: the position of each node in the graph.
    """
    conflicts: dict[str, fx.Node] = {}
    for path, by_node in uses.items():
        nodes = sorted(by_node, key=order.__getitem__)
        for node in nodes[1:]:
            if by_node[node] != by_node[nodes[0]]:
                conflicts.setdefault(path, node)
    return conflicts
