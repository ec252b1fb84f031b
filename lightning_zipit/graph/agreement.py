"""Traces several networks whose trunks shall become one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn

from lightning_zipit.errors import ArchitectureMismatchError, ZipItError
from lightning_zipit.graph.notes import reached
from lightning_zipit.graph.spaces import MergeGraph
from lightning_zipit.graph.trace import trace


def trace_all(
    backbones: Mapping[str, nn.Module],
    stop_at: str | None,
    merge_heads: bool = False,
    example: Tensor | None = None,
    verify: bool = False,
    barriers: Mapping[str, str] | None = None,
) -> dict[str, MergeGraph]:
    """Trace all source networks and make sure that their trunks are the same network.

    Args:
        backbones: the source networks by task.
        stop_at: the trunk's last module.
        merge_heads: merge the last layer too.
        example: an input of the networks, where their reshapes need one.
        verify: prove the table of the first network on the example; a space that fails becomes a barrier for all.
        barriers: nodes that shall stay in the heads, and why.

    Returns:
        The merge graph of each.

    Raises:
        ConfigurationError: with all differences.
        TraceError: if a network cannot be traced.
    """
    graphs: dict[str, MergeGraph] = {}
    problems: list[str] = []
    for task, backbone in backbones.items():
        try:
            graphs[task] = trace(
                backbone,
                stop_at,
                example_input=example,
                merge_heads=merge_heads,
                verify=example if verify and not graphs else None,
                barriers=next(iter(graphs.values())).barriers if graphs else barriers,
            )
        except ZipItError as error:
            if not graphs:
                raise
            problems.append(f"Task {task!r}: {error}")
            continue
        reference = next(iter(graphs))
        difference = first_difference(graphs[reference], graphs[task])
        if difference:
            problems.append(f"The networks of tasks {reference!r} and {task!r} differ: {difference}.")
    if problems:
        raise ArchitectureMismatchError.collect(problems)
    return graphs


def first_difference(first: MergeGraph, second: MergeGraph) -> str | None:
    """Where the trunks of two networks part, for people; ``None`` where they are the same network.

    The heads may differ: they are not merged.
    """
    nodes, others = list(first.trunk_graph()), list(second.trunk_graph())
    shapes, other_shapes = _trunk_shapes(first), _trunk_shapes(second)
    for name in (*shapes, *other_shapes):
        if shapes.get(name) != other_shapes.get(name):
            pair = f"{shapes.get(name)} in the first and {other_shapes.get(name)} in the second"
            return f"parameter `{name}` has shape {pair}"
    for node, other in zip(nodes, others, strict=False):
        operator, other_operator = (_operator(graph, item) for graph, item in ((first, node), (second, other)))
        if operator != other_operator:
            return f"node `{node.name}` is {operator} in the first and {other_operator} in the second"
    if len(nodes) != len(others):
        return f"one trunk has {len(nodes)} nodes and the other {len(others)}"
    if [crossing.node for crossing in first.crossings] != [crossing.node for crossing in second.crossings]:
        return "their heads read different values of the trunk"
    return None


def _trunk_shapes(graph: MergeGraph) -> dict[str, tuple[int, ...]]:
    tensors = dict((*graph.module.named_parameters(), *graph.module.named_buffers()))
    nodes = list(graph.trunk_graph())
    return {name: tuple(tensors[name].shape) for name in reached(nodes, set(nodes), tensors)}


def _operator(graph: MergeGraph, node: fx.Node) -> str:
    if node.op == "call_module":
        return f"{graph.module.get_submodule(str(node.target))} with {node.args} {node.kwargs}"
    return f"{getattr(node.target, '__name__', node.target)} with {node.args} {node.kwargs}"
