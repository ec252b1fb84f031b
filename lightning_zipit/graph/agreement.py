"""Traces several networks whose trunks shall become one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from lightning_zipit.errors import ArchitectureMismatchError, ZipItError
from lightning_zipit.graph.notes import reached
from lightning_zipit.graph.prove import find_failing
from lightning_zipit.graph.replay import working_copy
from lightning_zipit.graph.spaces import Crossing, MergeGraph
from lightning_zipit.graph.table import named_tensors
from lightning_zipit.graph.trace import analyse_again, trace
from lightning_zipit.views import Inputs, view_of


def trace_all(
    backbones: Mapping[str, nn.Module],
    stop_at: str | None,
    merge_heads: bool = False,
    example: Inputs | None = None,
    verify: bool = False,
    barriers: Mapping[str, str] | None = None,
    start_at: str | None = None,
) -> dict[str, MergeGraph]:
    """Trace all source networks and make sure that their trunks are the same network.

    Args:
        backbones: the source networks by task.
        stop_at: the trunk's last module.
        merge_heads: merge the last layer too.
        example: an input of the networks, or one of each by task, where their reshapes need one.
        verify: prove the trunk in the first network, and the heads of all, on the example; a space that fails becomes a
            barrier for all.
        barriers: nodes that shall stay in the heads, and why.
        start_at: the trunk's first module.

    Returns:
        The merge graph of each.

    Raises:
        ConfigurationError: with all differences.
        TraceError: if a network cannot be traced.
        VerificationError: if the proof finds that nothing can be merged.
    """

    def traced(known: Mapping[str, str] | None) -> dict[str, MergeGraph]:
        return _trace_each(backbones, stop_at, merge_heads, example, known, start_at)

    graphs = traced(barriers)
    if not verify or example is None:
        return graphs
    inputs = {task: view_of(example, task) for task in backbones}
    working = {task: working_copy(backbone) for task, backbone in backbones.items()}
    while failing := find_failing(working, graphs, inputs):
        graphs = analyse_again(next(iter(graphs.values())), failing, merge_heads, traced)
    return graphs


def _trace_each(
    backbones: Mapping[str, nn.Module],
    stop_at: str | None,
    merge_heads: bool,
    example: Inputs | None,
    barriers: Mapping[str, str] | None,
    start_at: str | None,
) -> dict[str, MergeGraph]:
    """The graph of each network; all have the barriers of the first."""
    graphs: dict[str, MergeGraph] = {}
    problems: list[str] = []
    for task, backbone in backbones.items():
        try:
            graphs[task] = trace(
                backbone,
                stop_at,
                example_input=None if example is None else view_of(example, task),
                merge_heads=merge_heads,
                barriers=next(iter(graphs.values())).barriers if graphs else barriers,
                start_at=start_at,
            )
        except ZipItError as error:
            if not graphs:
                raise
            problems.append(f"Task {task!r}: {error}")
            continue
        reference = next(iter(graphs))
        difference = first_difference(graphs[reference], graphs[task])
        if not difference and example is not None:
            difference = _first_difference_of_entries(graphs[reference], graphs[task])
        if difference:
            way_out = STEMS if start_at is None else ""
            problems.append(f"The networks of tasks {reference!r} and {task!r} differ: {difference}.{way_out}")
    if problems:
        raise ArchitectureMismatchError.collect(problems)
    return graphs


STEMS = " Where they differ in their first layers alone, let the trunk start behind those (`start_at`)."


def first_difference(first: MergeGraph, second: MergeGraph) -> str | None:
    """Where the trunks of two networks part, for people; ``None`` where they are the same network.

    Stems and heads may differ: they are not merged.
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
    if _read_by_heads(first) != _read_by_heads(second):
        return "their heads read different values of the trunk"
    handed, other_handed = ([_features(entry) for entry in graph.entries] for graph in (first, second))
    if handed != other_handed:
        pair = f"{' and '.join(handed)} in the first, {' and '.join(other_handed)} in the second"
        return f"their stems hand over other features: {pair}"
    return None


def _first_difference_of_entries(first: MergeGraph, second: MergeGraph) -> str | None:
    """Sizes are known for sure with an example alone."""
    shapes, others = ([entry.shape for entry in graph.entries] for graph in (first, second))
    if shapes == others:
        return None
    return (
        f"for their inputs, their stems hand over tensors of the shape {', '.join(map(str, shapes))} for a sample in "
        f"the first and {', '.join(map(str, others))} in the second"
    )


def _read_by_heads(graph: MergeGraph) -> list[str]:
    """Names of values of the trunk; what passes by it has a name of each network's own."""
    return [crossing.node if crossing.node in graph.trunk_nodes else "" for crossing in graph.crossings]


def _features(entry: Crossing) -> str:
    if entry.ref is None:
        return "none"
    size, blocks = sum(block.size for block in entry.ref.blocks), ", ".join(map(str, entry.ref.blocks))
    return f"{size} on axis {entry.axis} ({blocks})"


def _trunk_shapes(graph: MergeGraph) -> dict[str, tuple[int, ...]]:
    tensors = named_tensors(graph.module)
    nodes = list(graph.trunk_graph())
    return {name: tuple(tensors[name].shape) for name in reached(nodes, set(nodes), tensors)}


def _operator(graph: MergeGraph, node: fx.Node) -> str:
    args, kwargs = node.args, node.kwargs
    if graph.entries:  # their nodes have names of each network's own
        numbers = {entry.node: f"entry {number}" for number, entry in enumerate(graph.entries)}
        args, kwargs = fx.map_arg((args, kwargs), lambda source: numbers.get(source.name, source.name))
    if node.op == "call_module":
        name = f"`{node.target}` " if graph.entries else ""
        return f"{name}{graph.module.get_submodule(str(node.target))} with {args} {kwargs}"
    return f"{getattr(node.target, '__name__', node.target)} with {args} {kwargs}"
