"""Runs the merged network and its sources over all batches, layer after layer."""

from __future__ import annotations

import copy
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

    Values are kept where those of all batches fit into memory, and elsewhere computed from where they last did: of a
    network whose activations become smaller on the way, only the first layers are run anew for every stop.

    Args:
        runs: the networks.
        count: the number of batches.
        begin: from the number of a batch to the values that each network starts from, for it to change.
        limit: bytes that may be kept.
    """

    def __init__(self, runs: Sequence[Run], count: int, begin: Callable[[int], list[Values]], limit: int) -> None:
        self.runs = list(runs)
        self.count = count
        self._begin = begin
        self._limit = limit
        self._kept: list[list[Values]] = []  # per batch; nothing where all start from the beginning
        self._reached = [0] * len(self.runs)  # by what is kept

    def visit(self, ends: Sequence[int]) -> Iterator[list[Values]]:
        """Take all batches to a stop.

        Args:
            ends: per network, the node before which to stop, none of them before that of the last time.

        Yields:
            Per batch, the values of each network.
        """
        fits, ahead = False, []
        for number in range(self.count):
            batch = self._kept[number] if fits and self._kept else self._copy(number, range(len(self.runs)))
            for run, values, start, end in zip(self.runs, batch, self._reached, ends, strict=True):
                run.advance(values, start, end)
            if not number:
                fits = self._fits(batch)
            if fits:
                ahead.append(batch)
            yield batch
        if fits:
            self._kept, self._reached = ahead, list(ends)

    def complete(self) -> None:
        """Take all batches to the end of the networks, where that can be kept."""
        ends = [len(run.nodes) for run in self.runs]
        for batch in self.visit(ends):
            if not self._fits(batch):
                break

    def finish(self, batch: int, numbers: Sequence[int]) -> list[Values]:
        """The values that some networks have at their end, for the caller to change.

        Args:
            batch: the number of a batch.
            numbers: the numbers of the networks.
        """
        found = self._copy(batch, numbers)
        for number, values in zip(numbers, found, strict=True):
            run = self.runs[number]
            run.advance(values, self._reached[number], len(run.nodes))
        return found

    def _fits(self, batch: Sequence[Values]) -> bool:
        return sum(map(count_bytes, batch)) * self.count <= self._limit

    def _copy(self, batch: int, numbers: Sequence[int]) -> list[Values]:
        """What a batch goes on from in some networks, for them to change."""
        if not self._kept:
            values = self._begin(batch)
            return [values[number] for number in numbers]
        memo: dict[int, Any] = {}  # what shares memory goes on to share it
        return [
            {node: copy.deepcopy(value, memo) for node, value in self._kept[batch][number].items()}
            for number in numbers
        ]


def count_bytes(values: Mapping[fx.Node, Any]) -> int:
    """The memory of the tensors among some values."""
    return sum(value.untyped_storage().nbytes() for value in values.values() if isinstance(value, Tensor))
