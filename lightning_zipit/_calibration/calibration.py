"""Gathers the statistics of feature spaces over calibration batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_zipit._calibration.lockstep import Lockstep
from lightning_zipit._calibration.positions import ChosenPositions
from lightning_zipit._calibration.statistics import FeatureStatistics, Moments, sum_over_processes
from lightning_zipit._calibration.waiting import Waiting
from lightning_zipit._common.views import Inputs, any_view, view_of
from lightning_zipit.errors import CalibrationError, StatisticsError
from lightning_zipit.graph import MergeGraph, Tap


class Calibration:
    """Statistics of spaces of a merge graph.

    Args:
        graph: the merge graph of the networks.
        networks: the source networks by task, in eval mode.
        spaces: the names of the spaces to measure; by default all.
        dtype: the type of the Gram matrices of a batch; see :class:`~lightning_zipit.FeatureStatistics`.
        positions: how many positions of each sample are measured, at random; by default all.
        graphs: the merge graph of each network by task, where they have stems of their own.
    """

    def __init__(
        self,
        graph: MergeGraph,
        networks: Mapping[str, nn.Module],
        spaces: Collection[str] | None = None,
        dtype: torch.dtype = torch.float32,
        positions: int | None = None,
        graphs: Mapping[str, MergeGraph] | None = None,
    ) -> None:
        self.positions = positions
        self._chosen: ChosenPositions | None = None  # of the samples of this batch
        self.networks = dict(networks)
        self.tasks = list(networks)
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
        self.at_node: dict[str, list[tuple[str, Tap]]] = defaultdict(list)
        for key, name in self.spaces.items():
            for tap in (self.taps[name], *self.taps[name].also):
                self.at_node[tap.node].append((key, tap))
        own = [graphs[task] for task in networks] if graphs is not None else None
        self.lockstep = Lockstep(graph, list(networks.values()), own, self.at_node)
        self._statistics = {
            key: FeatureStatistics([len(self.taps[name].block.starts)] * len(networks), dtype)
            for key, name in self.spaces.items()
        }
        for each in self._statistics.values():
            each.few = max(each.sizes)  # what waits is then no more than this, or multiplied in single precision
        self._waiting: dict[str, Waiting] = {}

    @property
    def statistics(self) -> dict[str, FeatureStatistics]:
        """The statistics of all samples so far, by the key of the tap."""
        for waiting in self._waiting.values():
            waiting.flush()
        self._waiting.clear()
        return self._statistics

    def update(self, x: Inputs) -> None:
        """Add a batch.

        Args:
            x: an input of the networks, or one of each by task.
        """
        if self.taps:
            self._chosen = None if self.positions is None else ChosenPositions(any_view(x), self.positions)
            self.lockstep.run([view_of(x, task) for task in self.tasks], self._observe)

    def _observe(self, node: str, values: list[Tensor]) -> None:
        """Add samples; where they are fewer than the features of a model, together with those of the next batches.

        Products are then few and large, and statistics, which are much larger than the samples, are added to once.
        What waits takes at most a 2N-th of their memory and one batch more.
        """
        for key, tap in self.at_node.get(node, ()):
            statistics = self._statistics[key]
            if statistics.comoment.device != values[0].device:
                statistics.to(values[0].device)
            features = [tap.features(value) for value in values]
            if self._chosen is not None:
                features = [self._chosen.take(feature) for feature in features]
            if key not in self._waiting:
                if features[0][0].numel() > statistics.few:
                    statistics.update(features, features_first=True)
                    continue
                self._waiting[key] = Waiting(statistics, features)
            self._waiting[key].add(features)

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
        nodes = [*self.lockstep.entries, *self.lockstep.nodes]
        for key in (key for node in nodes for key, _ in self.at_node.get(node.name, ())):
            name, statistics = self.spaces[key], self.statistics[key]
            means = statistics.total.chunk(len(self.tasks))
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


def check_counts(seen: Sequence[Mapping[int, int]], expected: Sequence[int | None]) -> None:
    """Compare the samples that all processes have seen with the sizes of the data sets.

    Args:
        seen: per process, the samples of each loader.
        expected: the samples of each loader's data set; ``None`` where that is not known.

    Raises:
        CalibrationError: if samples were counted twice or not at all.
    """
    for loader, size in enumerate(expected):
        count = sum(counts.get(loader, 0) for counts in seen)
        if size is not None and count != size:
            raise CalibrationError(
                f"The processes have seen {count} samples of calibration loader {loader}, whose data set has {size}: "
                f"samples were {'counted twice' if count > size else 'left out'}. Leave sharing out the data to the "
                "Trainer (use_distributed_sampler=True, its default), and use no shuffling and no distributed sampler "
                "of your own: those shuffle in each process by themselves, or repeat samples to fill up."
            )
