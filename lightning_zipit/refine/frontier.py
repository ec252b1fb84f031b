"""Runs the merged network and its sources over all batches, layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

Values: TypeAlias = "dict[fx.Node, Any]"


class Run:
    """One network on its way through some nodes of a graph.

    Args:
        network: the network.
        nodes: the nodes, in order.
        kept: nodes whose values are not dropped after their last use.
    """

    def __init__(self, network: nn.Module, nodes: Sequence[fx.Node], kept: Iterable[fx.Node] = ()) -> None:
        self.network = network
        self.nodes = list(nodes)
        self._interpreter = fx.Interpreter(network, graph=self.nodes[0].graph)
        last = {source: node for node in self.nodes for source in (node, *node.all_input_nodes)}
        self._finished: dict[fx.Node, list[fx.Node]] = {}
        for source in set(last).difference(kept):
            if last[source] is not source:  # else it is a result
                self._finished.setdefault(last[source], []).append(source)

    def advance(self, values: Values, start: int, end: int) -> None:
        """Run some of the nodes on the values so far; values that have served are dropped.

        Args:
            values: per node its value; that of the network's input is there from the beginning.
            start: the first node.
            end: the node before which to stop.
        """
        self._interpreter.env = values
        for node in self.nodes[start:end]:
            if node not in values:
                values[node] = self._interpreter.run_node(node)
            for source in self._finished.get(node, ()):
                values.pop(source, None)


class Frontier:
    """What some networks have computed of every batch, as far as they have come.

    Args:
        runs: the networks.
        count: the number of batches.
        begin: from the number of a batch to the values that each network starts from, for it to change.
        limit: bytes that may be kept; where the values of all batches take more, they are computed anew from the
            start for every stop.
    """

    def __init__(self, runs: Sequence[Run], count: int, begin: Callable[[int], list[Values]], limit: int) -> None:
        self.runs = list(runs)
        self.count = count
        self._begin = begin
        self._reached = [0] * len(self.runs)
        self.kept = count > 0 and self._widest() * count <= limit
        self._ended: set[tuple[int, int]] = set()
        self._values = [begin(number) for number in range(count)] if self.kept else []

    def _widest(self) -> int:
        """The most bytes that the values of one batch take at once."""
        values, most = self._begin(0), 0
        for position in range(max(len(run.nodes) for run in self.runs)):
            for run, held in zip(self.runs, values, strict=True):
                run.advance(held, position, position + 1)
            most = max(most, sum(map(count_bytes, values)))
        return most

    def visit(self, ends: Sequence[int]) -> Iterator[list[Values]]:
        """Take all batches to a stop.

        Args:
            ends: per network, the node before which to stop, none of them before that of the last time.

        Yields:
            Per batch, the values of each network.
        """
        for number in range(self.count):
            batch = self._values[number] if self.kept else self._begin(number)
            starts = self._reached if self.kept else [0] * len(self.runs)
            for run, values, start, end in zip(self.runs, batch, starts, ends, strict=True):
                run.advance(values, start, end)
            yield batch
        self._reached = list(ends)

    def finish(self, batch: int, numbers: Sequence[int]) -> list[Values]:
        """The values that some networks have at their end.

        Args:
            batch: the number of a batch.
            numbers: the numbers of the networks.
        """
        values = self._values[batch] if self.kept else self._begin(batch)
        for number in numbers:
            run = self.runs[number]
            if (batch, number) not in self._ended:
                run.advance(values[number], self._reached[number] if self.kept else 0, len(run.nodes))
            if self.kept:
                self._ended.add((batch, number))
        return [values[number] for number in numbers]


def count_bytes(values: Mapping[fx.Node, Any]) -> int:
    """The memory of the tensors among some values."""
    return sum(value.untyped_storage().nbytes() for value in values.values() if isinstance(value, Tensor))
