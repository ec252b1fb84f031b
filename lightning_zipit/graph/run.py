"""Execution of some nodes of a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

IN_PLACE = "in_place"
"""Key of the operator of the forward that writes in place, where the graph has one that returns a new tensor."""

Values: TypeAlias = "dict[fx.Node, Any]"
"""Values of nodes."""


class Run(fx.Interpreter):
    """Interpreter that runs some nodes of a graph on a network, and drops each value after its last use.

    A run can start from the values of any nodes, stop before any node, and continue later.

    Args:
        network: the network.
        graph: its graph.
        nodes: the nodes to run, in order; by default all nodes of the graph.
        kept: the nodes whose values are not dropped; by default those that no node of the run reads.
        in_place: write in place where the forward does. This saves memory.
        watch: function that is called with each node and its value, right after the value is computed.
    """

    def __init__(
        self,
        network: nn.Module,
        graph: fx.Graph,
        nodes: Iterable[fx.Node] | None = None,
        kept: Iterable[fx.Node] | None = None,
        in_place: bool = False,
        watch: Callable[[fx.Node, Any], None] | None = None,
    ) -> None:
        super().__init__(network, garbage_collect_values=False, graph=graph)
        self.network = network
        self.nodes = list(graph.nodes if nodes is None else nodes)
        self.in_place = in_place
        self._watch = watch
        last = {source: node for node in self.nodes for source in (node, *node.all_input_nodes)}
        self.kept = list(kept) if kept is not None else [node for node in self.nodes if last[node] is node]
        self._finished: dict[fx.Node, list[fx.Node]] = {}
        for source in set(last).difference(self.kept):
            self._finished.setdefault(last[source], []).append(source)

    def run_node(self, n: fx.Node) -> Any:
        """Compute one node from the values of its inputs."""
        if self.in_place and n.meta.get(IN_PLACE):
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), self.env.__getitem__)
            return n.meta[IN_PLACE](*args, **kwargs)
        return super().run_node(n)

    def enter(self, values: Values) -> None:
        """Start or continue a run from the values of nodes. The run changes the given dict."""
        self.env = values

    def leave(self) -> None:
        """Release all values."""
        self.env = {}

    def compute(self, node: fx.Node) -> None:
        """Compute a node, unless its value is known."""
        if node not in self.env:
            self.env[node] = self.run_node(node)
            if self._watch is not None:
                self._watch(node, self.env[node])

    def drop(self, node: fx.Node) -> None:
        """Drop the values whose last reader is this node."""
        for source in self._finished.get(node, ()):
            self.env.pop(source, None)

    def advance(self, values: Values, start: int = 0, end: int | None = None) -> None:
        """Run the nodes between two positions.

        Args:
            values: the values of earlier nodes; the dict is changed.
            start: the position of the first node.
            end: the position after the last node; by default the end of the run.
        """
        self.enter(values)
        try:
            for node in self.nodes[start:end]:
                self.compute(node)
                self.drop(node)
        finally:
            self.leave()

    def results(self, known: Mapping[fx.Node, Any]) -> Values:
        """Run all nodes.

        Args:
            known: values of inputs or other nodes. They are not changed, even by in-place operators.

        Returns:
            The values of the kept nodes, each copied right after its computation.
        """
        found = {node: known[node] for node in self.kept if node in known}
        self.enter({node: cloned(value) for node, value in known.items()})
        try:
            for node in self.nodes:
                self.compute(node)
                if node in self.kept and node not in found:
                    found[node] = cloned(self.env[node])
                self.drop(node)
        finally:
            self.leave()
        return {node: found[node] for node in self.kept}


def enter_inputs(nodes: Iterable[fx.Node], tensors: Iterable[Tensor]) -> Values:
    """Return the values of the inputs among some nodes, which a run starts from.

    Args:
        nodes: nodes of a graph, in order.
        tensors: the tensors of an input, in the order of the graph's placeholders.
    """
    return dict(zip((node for node in nodes if node.op == "placeholder"), tensors, strict=True))


def cloned(value: Any) -> Any:
    """Return a copy of a tensor, and any other value unchanged."""
    return value.clone() if isinstance(value, Tensor) else value
