"""Layer-by-layer execution of several networks over all batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from lightning_zipit.graph.run import Run, Values


class Frontier:
    """The values of several networks on every batch, up to the node that each network has reached.

    The values of all batches are cached if they fit into memory. Otherwise they are recomputed from the last node whose
    values did fit. In a network whose activations shrink with depth, only the first layers run again for every layer.

    Args:
        runs: the runs of the networks.
        count: the number of batches.
        begin: returns the start values of each network for a batch index. These values are changed in place.
        limit: the highest number of bytes to cache.
    """

    def __init__(self, runs: Sequence[Run], count: int, begin: Callable[[int], list[Values]], limit: int) -> None:
        self.runs = list(runs)
        self.count = count
        self._begin = begin
        self._limit = limit
        self._kept: list[list[Values]] = []  # cached values per batch; empty if all runs start from the beginning
        self._reached = [0] * len(self.runs)  # node index of the cached values of each network

    def visit(self, ends: Sequence[int]) -> Iterator[list[Values]]:
        """Run all batches up to a node.

        Args:
            ends: per network, the index of the node before which to stop. It must not be lower than in the last call.

        Yields:
            Per batch, the values of each network.
        """
        fits, ahead = False, []
        for index in range(self.count):
            batch = self._kept[index] if fits and self._kept else self._copy(index, range(len(self.runs)))
            for run, values, start, end in zip(self.runs, batch, self._reached, ends, strict=True):
                run.advance(values, start, end)
            if not index:
                fits = self._fits(batch)
            if fits:
                ahead.append(batch)
            yield batch
        if fits:
            self._kept, self._reached = ahead, list(ends)

    def complete(self) -> None:
        """Run all batches to the end of the networks, if the final values fit into memory."""
        ends = [len(run.nodes) for run in self.runs]
        for batch in self.visit(ends):
            if not self._fits(batch):
                break

    def finish(self, batch: int, networks: Sequence[int]) -> list[Values]:
        """Compute the final values of some networks on a batch. The caller may change the values.

        Args:
            batch: the index of the batch.
            networks: the indices of the networks.
        """
        found = self._copy(batch, networks)
        for network, values in zip(networks, found, strict=True):
            run = self.runs[network]
            run.advance(values, self._reached[network], len(run.nodes))
        return found

    def _fits(self, batch: Sequence[Values]) -> bool:
        return sum(map(count_bytes, batch)) * self.count <= self._limit

    def _copy(self, batch: int, networks: Sequence[int]) -> list[Values]:
        """Copy the values from which some networks continue on a batch. The caller may change the copies."""
        if not self._kept:
            values = self._begin(batch)
            return [values[network] for network in networks]
        memo: dict[int, Any] = {}  # views of one tensor are copied to views of one copy
        return [
            {node: copy.deepcopy(value, memo) for node, value in self._kept[batch][network].items()}
            for network in networks
        ]


def count_bytes(values: Mapping[fx.Node, Any]) -> int:
    """Count the bytes of the tensors among some values."""
    return sum(value.untyped_storage().nbytes() for value in values.values() if isinstance(value, Tensor))
