"""Runs the source models over calibration data, in lockstep, and gathers the statistics of every space."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from lightning_zipit.errors import CalibrationError, StatisticsError
from lightning_zipit.graph import MergeGraph, Tap
from lightning_zipit.statistics import FeatureStatistics, Moments, sum_over_processes


class Lockstep:
    """Runs the trunks of N networks of one architecture side by side, one node of the graph at a time.

    Every activation is dropped after its last use, so that the peak memory is that of N plain forwards.

    Args:
        graph: the merge graph of the networks.
        networks: the networks, each in the mode and on the device that it shall run in.
    """

    def __init__(self, graph: MergeGraph, networks: Sequence[nn.Module]) -> None:
        self.nodes = list(graph.trunk_graph())
        self.interpreters = [fx.Interpreter(network, graph=graph.fx_graph) for network in networks]
        last_use = {source: node for node in self.nodes for source in (node, *node.all_input_nodes)}
        self.finished: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for source, node in last_use.items():
            self.finished[node].append(source)

    def run(self, x: Tensor, observe: Callable[[str, list[Tensor]], None]) -> None:
        """Run all networks on one input.

        Args:
            x: the input.
            observe: called after each node with its name and its value in every network.
        """
        try:
            for node in self.nodes:
                for interpreter in self.interpreters:
                    # A clone: an operator that works in place must not change what the next network sees.
                    value = x.clone() if node.op == "placeholder" else interpreter.run_node(node)
                    interpreter.env[node] = value
                observe(node.name, [interpreter.env[node] for interpreter in self.interpreters])
                for interpreter in self.interpreters:
                    for source in self.finished[node]:
                        del interpreter.env[source]
        finally:
            for interpreter in self.interpreters:
                interpreter.env.clear()


class Calibration:
    """Statistics of spaces of a merge graph.

    Args:
        graph: the merge graph of the networks.
        networks: the source networks by task, in eval mode.
        spaces: the names of the spaces to measure; by default all.
        dtype: the type of the Gram matrices of a batch; see :class:`~lightning_zipit.FeatureStatistics`.
    """

    def __init__(
        self,
        graph: MergeGraph,
        networks: Mapping[str, nn.Module],
        spaces: Collection[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.networks = dict(networks)
        self.tasks = list(networks)
        self.lockstep = Lockstep(graph, list(networks.values()))
        self.taps = {
            name: space.tap
            for name, space in graph.spaces.items()
            if space.tap is not None and (spaces is None or name in spaces)
        }
        # Spaces that read the same entries share statistics, which go by the key of the tap.
        self.measured = {name: tap.key for name, tap in self.taps.items()}
        self.spaces: dict[str, str] = {}  # the first space of each
        for name, key in self.measured.items():
            self.spaces.setdefault(key, name)
        self.at_node: dict[str, list[str]] = defaultdict(list)
        for key, name in self.spaces.items():
            self.at_node[self.taps[name].node].append(key)
        self.statistics = {
            key: FeatureStatistics([len(self.taps[name].block.starts)] * len(networks), dtype)
            for key, name in self.spaces.items()
        }

    def update(self, x: Tensor) -> None:
        """Add a batch.

        Args:
            x: an input of the networks.
        """
        if self.taps:
            self.lockstep.run(x, self._observe)

    def _observe(self, node: str, values: list[Tensor]) -> None:
        for key in self.at_node.get(node, ()):
            statistics = self.statistics[key].to(values[0].device)
            tap = self.taps[self.spaces[key]]
            statistics.update([tap.samples(value) for value in values])

    def restore(self, known: Mapping[str, FeatureStatistics]) -> None:
        """Add statistics that were gathered before, by tap; they are used up.

        Raises:
            StatisticsError: if they are of other spaces.
        """
        missing = [self.spaces[key] for key in self.statistics if key not in known]
        if missing:
            raise StatisticsError(
                f"The statistics file knows nothing of {len(missing)} of {len(self.statistics)} feature spaces, such "
                f"as {missing[0]!r}: it was gathered with another `stop_at` or `merge_heads`, or for another "
                "`refine` (least squares measure features in front of their activation function, unless "
                "`pre_activations` is false). Delete it, or name another, to gather anew."
            )
        device = next(next(iter(self.networks.values())).parameters()).device
        for key, statistics in self.statistics.items():
            statistics.to(device).merge_state(known[key].to(device))
            known[key].free()

    def sum_over_processes(self) -> None:
        """Put the samples of all processes into the statistics of each."""
        sum_over_processes(list(self.statistics.values()))

    def check_finite(self) -> None:
        """Look for NaN and Inf in what was gathered so far.

        Raises:
            CalibrationError: naming the first space and the tasks whose activations are not finite.
        """
        for key in (key for node in self.lockstep.nodes for key in self.at_node.get(node.name, ())):
            name, statistics = self.spaces[key], self.statistics[key]
            means = (statistics.origin + statistics.offset).chunk(len(self.tasks))
            spread = statistics.comoment.diagonal().chunk(len(self.tasks))
            bad = [
                task
                for task, mean, power in zip(self.tasks, means, spread, strict=True)
                if not (mean.isfinite().all() and power.isfinite().all())
            ]
            if bad:
                raise CalibrationError(
                    f"NaN or Inf in the activations of task {', '.join(map(repr, bad))} at feature space "
                    f"{name!r} (read by `{self.taps[name].reader}`). Look at that model's weights and at the "
                    "calibration data for NaN or Inf; "
                    "under 16-bit precision an overflow is likely: calibrate with precision='32-true'."
                )

    def take(self, space: str) -> Moments | None:
        """Moments of a space over what was gathered here; statistics that no other space needs are dropped.

        Returns:
            ``None`` for a space that is not measured.
        """
        if space not in self.measured:
            return None
        key = self.measured.pop(space)
        moments = self.statistics[key].moments()
        if key not in self.measured.values():
            self.statistics.pop(key).free()
        return self._project(self.taps[space], moments)

    def _project(self, tap: Tap, moments: Moments) -> Moments:
        """The moments of linear functions of what was measured: W C Wᵀ, summed over queries and keys."""
        if not tap.projections:
            return moments
        means, covariances = [], []
        for projection in tap.projections:
            weights = [
                network.get_parameter(projection.weight).detach()[list(projection.rows)].to(moments.mean)
                for network in self.networks.values()
            ]
            own = zip(weights, moments.mean.chunk(len(weights)), moments.covariance.chunk(len(weights)), strict=True)
            per_model = [(weight @ mean, weight @ rows) for weight, mean, rows in own]
            means.append(torch.cat([mean for mean, _ in per_model]))
            columns = torch.cat([rows for _, rows in per_model]).chunk(len(weights), dim=1)
            covariances.append(torch.cat([part @ weight.T for part, weight in zip(columns, weights, strict=True)], 1))
        return Moments(moments.count, torch.stack(means).mean(0), torch.stack(covariances).sum(0))


def statistics_bytes(graph: MergeGraph, space: str, num_models: int) -> int:
    """The memory of a space's statistics: a float64 matrix over the features of all models."""
    tap = graph.spaces[space].tap
    return 0 if tap is None else 8 * (num_models * len(tap.block.starts)) ** 2
