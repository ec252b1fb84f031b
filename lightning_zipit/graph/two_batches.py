"""One graph for all batch sizes, from the graphs of two: for forwards that turn the batch size into a plain number."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx


class DifferentGraphsError(Exception):
    """Two graphs differ in more than numbers that grow with the batch."""


def join(first: fx.Graph, second: fx.Graph, batches: Sequence[int]) -> None:
    """Replace the numbers in a graph that grow with the batch by what computes them from the input's size.

    Args:
        first: the graph for the first batch size; it is changed.
        second: the graph for the second.
        batches: the two batch sizes.

    Raises:
        DifferentGraphsError: if the graphs differ in anything but whole numbers, or in these otherwise.
    """
    nodes, others = list(first.nodes), list(second.nodes)
    if [(node.op, str(node.target)) for node in nodes] != [(node.op, str(node.target)) for node in others]:
        raise DifferentGraphsError("other operators run for other numbers of samples, as a loop over samples does")
    _Join(first, dict(zip(others, nodes, strict=True)), batches).run(zip(nodes, others, strict=True))


class _Join:
    """The replacement of numbers in one graph."""

    def __init__(self, graph: fx.Graph, twins: dict[fx.Node, fx.Node], batches: Sequence[int]) -> None:
        self.graph, self.twins, self.batches = graph, twins, batches
        self.batch: fx.Node | None = None

    def run(self, pairs: Any) -> None:
        anchor = next(node for node in self.graph.nodes if node.op == "placeholder" and node.meta["shape"])
        inside = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(inside):
            self.batch = self.graph.call_function(torch.ops.aten.sym_size.int, (anchor, 0))
        self.batch.meta = {"value": self.batches[0], "nn_module_stack": {}}
        for node, other in pairs:
            with self.graph.inserting_before(node):
                args, kwargs = self.joined((node.args, node.kwargs), (other.args, other.kwargs), node)
            node.args, node.kwargs = args, kwargs
        if not self.batch.users:
            self.graph.erase_node(self.batch)

    def joined(self, one: Any, two: Any, node: fx.Node) -> Any:
        if isinstance(one, fx.Node) and self.twins.get(two) is one:
            return one
        if isinstance(one, (tuple, list)) and type(one) is type(two) and len(one) == len(two):
            parts = [self.joined(a, b, node) for a, b in zip(one, two, strict=True)]
            return type(one)(parts)
        if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
            return {key: self.joined(one[key], two[key], node) for key in one}
        if type(one) is int and type(two) is int and one != two:
            return self.expression(one, two, node)
        if type(one) is type(two) and (one == two or (one != one and two != two)):
            return one
        raise DifferentGraphsError(
            f"`{node.target}` is given {one} for {self.batches[0]} samples, {two} for {self.batches[1]}"
        )

    def expression(self, one: int, two: int, node: fx.Node) -> Any:
        """``factor * batch + offset``."""
        factor, rest = divmod(two - one, self.batches[1] - self.batches[0])
        if rest:
            raise DifferentGraphsError(
                f"`{node.target}` is given {one} for {self.batches[0]} samples and {two} for {self.batches[1]}, which "
                "is no multiple of the samples"
            )
        offset = one - factor * self.batches[0]
        value: Any = self.batch if factor == 1 else self.graph.call_function(operator.mul, (self.batch, factor))
        return self.graph.call_function(operator.add, (value, offset)) if offset else value
