"""Runs several networks over all batches, from layer to layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from lightning_zipit.graph.run import Run, Values


class Frontier:
    """The values of several networks on every batch, up to the node that each network has reached.

    Values are kept if those of all batches fit into memory. Otherwise they are computed again, from the last node where
    they did fit: in a network whose activations shrink, only the first layers run again for every layer.

    Args:
        runs: the networks.
        count: the number of batches.
        begin: from the number of a batch to the values from which each network starts; they are changed.
        limit: bytes that may be kept.
    """

    def __init__(self, runs: Sequence[Run], count: int, begin: Callable[[int], list[Values]], limit: int) -> None:
        self.runs = list(runs)
        self.count = count
        self._begin = begin
        self._limit = limit
        self._kept: list[list[Values]] = []  # per batch; empty if all start from the beginning
        self._reached = [0] * len(self.runs)  # by the values that are kept

    def visit(self, ends: Sequence[int]) -> Iterator[list[Values]]:
        """Run all batches to a node.

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
        """Run all batches to the end of the networks, if their values there can be kept."""
        ends = [len(run.nodes) for run in self.runs]
        for batch in self.visit(ends):
            if not self._fits(batch):
                break

    def finish(self, batch: int, numbers: Sequence[int]) -> list[Values]:
        """The values of some networks at their end; the caller may change them.

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
        """The values from which some networks continue on a batch; the caller may change them."""
        if not self._kept:
            values = self._begin(batch)
            return [values[number] for number in numbers]
        memo: dict[int, Any] = {}  # copies of views of one tensor are views of one copy
        return [
            {node: copy.deepcopy(value, memo) for node, value in self._kept[batch][number].items()}
            for number in numbers
        ]


def count_bytes(values: Mapping[fx.Node, Any]) -> int:
    """The memory of the tensors among some values."""
    return sum(value.untyped_storage().nbytes() for value in values.values() if isinstance(value, Tensor))
