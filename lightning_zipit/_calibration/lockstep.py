"""Lockstep execution of the trunks of several networks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor, nn

from lightning_zipit._calibration.folding import Folds
from lightning_zipit._common.calls import Call
from lightning_zipit.graph import MergeGraph
from lightning_zipit.graph.run import Run, Values, enter_inputs


class Lockstep:
    """Run the trunks of N networks of one architecture in lockstep, one node of the graph at a time.

    Every activation is freed after its last use: the peak memory is that of N plain forwards. A batch norm directly
    after a convolution is folded into it.

    Args:
        graph: the merge graph of the networks.
        networks: the networks. Their mode and device are not changed.
        graphs: the merge graph of each network, if the networks have different stems.
        observed: the names of the nodes that are observed.
    """

    def __init__(
        self,
        graph: MergeGraph,
        networks: Sequence[nn.Module],
        graphs: Sequence[MergeGraph] | None = None,
        observed: Collection[str] = (),
    ) -> None:
        self.nodes = list(graph.trunk_graph())
        by_name = {node.name: node for node in graph.fx_graph.nodes}
        self.entries = [by_name[entry.node] for entry in graph.entries]
        pairs = zip(graphs or [graph] * len(networks), networks, strict=True)
        self.stems = [run_of_stem(own, network) for own, network in pairs] if graph.stem_nodes else []
        self.runs = [Run(network, graph.fx_graph, self.nodes, kept=(), in_place=True) for network in networks]
        self.folds = Folds(networks, self.nodes, observed)

    def run(self, views: Sequence[Call], observe: Callable[[str, list[Tensor]], None]) -> None:
        """Run all networks on one batch.

        Args:
            views: the input of each network.
            observe: called after each node with its name and its value in every network. For a convolution with a
                folded batch norm, the value is the output of the batch norm.
        """
        try:
            for index, (run, x) in enumerate(zip(self.runs, views, strict=True)):
                run.enter(self._start(index, x))
            for node in self.entries:
                observe(node.name, [run.env[node] for run in self.runs])
            for node in self.nodes:
                for run in self.runs:
                    if not self.folds.run(run, node):
                        run.compute(node)
                observe(node.name, [run.env[node] for run in self.runs])
                for run in self.runs:
                    run.drop(node)
        finally:
            for run in self.runs:
                run.leave()

    def _start(self, index: int, x: Call) -> Values:
        """Compute the values at which the trunk of a network starts."""
        if self.stems:
            return dict(zip(self.entries, run_stem(self.stems[index], x), strict=True))
        return enter_inputs(self.nodes, x.copies)  # operators in place must not change another network's input


def run_of_stem(graph: MergeGraph, network: nn.Module) -> Run:
    """Create the run of a network's stem; see :func:`run_stem`.

    Args:
        graph: the merge graph of the network.
        network: the network.
    """
    by_name = {node.name: node for node in graph.fx_graph.nodes}
    entries = [by_name[entry.node] for entry in graph.entries]
    return Run(network, graph.fx_graph, graph.stem_graph(), entries, in_place=True)


def run_stem(run: Run, x: Call) -> list[Tensor]:
    """Compute the values that a stem passes to the trunk, in the order of the graph's entries."""
    return list(run.results(enter_inputs(run.nodes, x.tensors)).values())
