"""What comes before the trunk: a stem per task, which may differ from model to model."""

from __future__ import annotations

import re

from torch import fx, nn

from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph.cut import no_such_module, with_items
from lightning_zipit.graph.naming import modules_around
from lightning_zipit.graph.order import descendants, varying, with_constants


def find_behind(backbone: nn.Module, nodes: list[fx.Node], start_at: str) -> set[fx.Node]:
    """The nodes that depend on the trunk's first module, and the constants that they read.

    Args:
        backbone: the network.
        nodes: its graph in order, as :func:`split_constants` leaves it.
        start_at: the trunk's first module.

    Raises:
        ConfigurationError: if there is no such module.
    """
    first = {node for node in nodes if start_at in modules_around(node) or node.target == start_at}
    if not first:
        raise ConfigurationError(no_such_module(backbone, nodes, "start_at", start_at))
    return with_constants(descendants(first & varying(nodes), nodes), nodes)


def find_stem(
    nodes: list[fx.Node],
    start_at: str,
    trunk: set[fx.Node],
    behind: set[fx.Node],
    shapes: dict[str, tuple[int, ...]],
) -> set[fx.Node]:
    """The nodes that do not depend on the trunk's first module, of those before the heads.

    Args:
        nodes: the graph in order.
        start_at: the trunk's first module.
        trunk: the nodes before the heads.
        behind: those that depend on that module; see :func:`find_behind`.
        shapes: sizes of tensors by node name, where they are known.

    Raises:
        ConfigurationError: if ``start_at`` comes after the trunk or first of all.
    """
    if not behind & trunk & varying(nodes):
        raise ConfigurationError(
            f"start_at={start_at!r} comes after the trunk's end, so that nothing is left to merge: name an earlier "
            "module, or a later `stop_at`."
        )
    stem = with_constants(with_items((trunk - behind) & varying(nodes), nodes, shapes), nodes)
    if all(node.op == "placeholder" for node in stem):
        raise ConfigurationError(
            f"start_at={start_at!r} cuts nothing: no other module comes before it. Use start_at=None to merge from the "
            "input on."
        )
    return stem


def split_constants(graph: fx.Graph) -> None:
    """Let every node that depends on the input read parameters and what is computed from them alone by itself.

    A weight that is used before the trunk and in it is then two nodes, of which each belongs to one part.
    """
    depending = varying(graph.nodes)
    for node in [node for node in graph.nodes if node in depending or node.op == "output"]:
        built: dict[fx.Node, fx.Node] = {}

        def own(source: fx.Node, built: dict[fx.Node, fx.Node] = built) -> fx.Node:
            if source not in depending and source not in built:
                built[source] = graph.node_copy(source, own)
            return built.get(source, source)

        with graph.inserting_before(node):
            node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), own)
    for node in reversed(list(graph.nodes)):
        if not node.users and node not in depending and node.op != "output":
            graph.erase_node(node)


def name_apart(graph: fx.Graph, behind: set[fx.Node], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Name nodes so that the names of those behind the trunk's start do not depend on what comes before it.

    Args:
        graph: the graph; it is changed.
        behind: the nodes behind the trunk's start.
        shapes: sizes by the names that the nodes have.

    Returns:
        Sizes by the new names.
    """
    taken: set[str] = set()
    renamed: dict[str, tuple[int, ...]] = {}
    for node in sorted(graph.nodes, key=lambda node: node not in behind):
        base = _plain_name(node) if node in behind else f"stem_{node.name}"
        name, number = base, 0
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        if node.name in shapes:
            renamed[name] = shapes[node.name]
        node.name = name
    return renamed


def _plain_name(node: fx.Node) -> str:
    """The name of a node without the number that its namesakes before it have given it."""
    if node.op in ("call_module", "get_attr"):
        name = re.sub(r"\W", "_", str(node.target))
        return f"_{name}" if name[0].isdigit() else name
    return re.sub(r"(?<=.)(_\d+)+$", "", node.name)
