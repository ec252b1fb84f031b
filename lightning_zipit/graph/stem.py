"""The stem: the part before the trunk, which stays per task and may differ between models."""

from __future__ import annotations

from torch import fx, nn

from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph.cut import no_such_module, with_items
from lightning_zipit.graph.naming import free_name, modules_around, name_nodes
from lightning_zipit.graph.order import descendants, varying, with_constants


def find_after_start(backbone: nn.Module, nodes: list[fx.Node], start_at: str) -> set[fx.Node]:
    """Find the nodes that depend on the trunk's first module, and the constants that they read.

    Args:
        backbone: the network.
        nodes: the nodes of its graph in order, after :func:`split_constants`.
        start_at: the trunk's first module.

    Raises:
        ConfigurationError: if the module does not exist, or the forward does not call it.
    """
    first = {node for node in nodes if start_at in modules_around(node) or node.target == start_at}
    if not first:
        raise ConfigurationError(no_such_module(backbone, nodes, "start_at", start_at))
    return with_constants(descendants(first & varying(nodes), nodes), nodes)


def find_stem(
    nodes: list[fx.Node],
    start_at: str,
    trunk: set[fx.Node],
    after_start: set[fx.Node],
    shapes: dict[str, tuple[int, ...]],
) -> set[fx.Node]:
    """Find the nodes before the heads that do not depend on the trunk's first module.

    Args:
        nodes: the nodes of the graph in order.
        start_at: the trunk's first module.
        trunk: the nodes before the heads.
        after_start: the nodes that depend on the trunk's first module; see :func:`find_after_start`.
        shapes: known shapes of tensors by node name.

    Raises:
        ConfigurationError: if ``start_at`` comes after the trunk's end, or no module comes before it.
    """
    if not after_start & trunk & varying(nodes):
        raise ConfigurationError(
            f"start_at={start_at!r} comes after the trunk's end, so nothing is left to merge. Choose an earlier "
            "module, or a later `stop_at`."
        )
    stem = with_constants(with_items((trunk - after_start) & varying(nodes), nodes, shapes), nodes)
    if all(node.op == "placeholder" for node in stem):
        raise ConfigurationError(
            f"start_at={start_at!r} leaves no stem: no other module comes before it. Use start_at=None to merge from "
            "the input on."
        )
    return stem


def split_constants(graph: fx.Graph) -> None:
    """Give every node that depends on the input its own copies of the constant nodes that it reads.

    A weight that both stem and trunk use is then two nodes, one in each part.
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


def name_apart(
    graph: fx.Graph, after_start: set[fx.Node], shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Rename nodes, so that names after the trunk's start do not depend on the nodes before it.

    Args:
        graph: the graph; it is changed.
        after_start: the nodes after the trunk's start.
        shapes: shapes of tensors by old node name.

    Returns:
        Shapes of tensors by new node name.
    """
    of_node = {node: shapes[node.name] for node in graph.nodes if node.name in shapes}
    taken = name_nodes(node for node in graph.nodes if node in after_start)
    for node in graph.nodes:
        if node not in after_start:
            node.name = free_name(f"stem_{node.name}", taken)
    return {node.name: shape for node, shape in of_node.items()}
