"""Accumulation of feature statistics over calibration batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_zipit._calibration.buffer import SampleBuffer
from lightning_zipit._calibration.lockstep import Lockstep
from lightning_zipit._calibration.positions import ChosenPositions
from lightning_zipit._calibration.statistics import FeatureStatistics, Moments, sum_over_processes
from lightning_zipit._common.views import Inputs, any_view, view_of
from lightning_zipit.errors import CalibrationError, StatisticsError
from lightning_zipit.graph import MergeGraph, Tap


class Calibration:
    """Accumulate the statistics of the feature spaces of a merge graph.

    Args:
        graph: the merge graph of the networks.
        networks: the source networks by task, in eval mode.
        spaces: the names of the spaces to measure; by default all.
        dtype: the dtype of the Gram matrix of a batch; see :class:`~lightning_zipit.FeatureStatistics`.
        positions: the number of positions that are sampled from each sample; by default all are used.
        graphs: the merge graph of each network by task, if the networks have different stems.
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
        self._chosen: ChosenPositions | None = None  # for the current batch
        self.networks = dict(networks)
        self.tasks = list(networks)
        self.taps = {
            name: space.tap
            for name, space in graph.spaces.items()
            if space.tap is not None and (spaces is None or name in spaces)
        }
        # Spaces with the same tap share their statistics. The key of the tap identifies them.
        self.measured = {name: tap.key for name, tap in self.taps.items()}
        self.spaces: dict[str, str] = {}  # tap key → first space with this tap
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
            # Buffered samples never exceed this number, unless their product is taken in single precision.
            each.float64_limit = max(each.sizes)
        self._buffers: dict[str, SampleBuffer] = {}

    @property
    def statistics(self) -> dict[str, FeatureStatistics]:
        """Statistics of all samples so far, by tap key."""
        for buffer in self._buffers.values():
            buffer.flush()
        self._buffers.clear()
        return self._statistics

    def update(self, x: Inputs) -> None:
        """Add a batch.

        Args:
            x: one input for all networks, or one input per task.
        """
        if self.taps:
            self._chosen = None if self.positions is None else ChosenPositions(any_view(x), self.positions)
            self.lockstep.run([view_of(x, task) for task in self.tasks], self._observe)

    def _observe(self, node: str, values: list[Tensor]) -> None:
        """Add the samples of a node. Buffer them if they are fewer than the features of a model.

        Buffering makes the matrix products few and large. It also updates the statistics less often, which are much
        larger than the samples. The buffer takes at most 1/(2N) of the memory of the statistics, plus one batch.
        """
        for key, tap in self.at_node.get(node, ()):
            statistics = self._statistics[key]
            if statistics.comoment.device != values[0].device:
                statistics.to(values[0].device)
            features = [tap.features(value) for value in values]
            if self._chosen is not None:
                features = [self._chosen.take(feature) for feature in features]
            if key not in self._buffers:
                if features[0][0].numel() > statistics.float64_limit:
                    statistics.update(features, features_first=True)
                    continue
                self._buffers[key] = SampleBuffer(statistics, features)
            self._buffers[key].add(features)

    def restore(self, known: Mapping[str, FeatureStatistics]) -> None:
        """Add saved statistics, and free the memory of the saved copies.

        Args:
            known: the saved statistics by tap key.

        Raises:
            StatisticsError: if a feature space of this merge has no saved statistics.
        """
        missing = [self.spaces[key] for key in self.statistics if key not in known]
        if missing:
            raise StatisticsError(
                f"The statistics file lacks {len(missing)} of {len(self.statistics)} feature spaces, such as "
                f"{missing[0]!r}. It was written with another `stop_at`, `merge_heads` or `refine` (least squares "
                "measures features in front of the activation, unless `pre_activations` is false). Delete the file, "
                "or give another path, to calibrate again."
            )
        device = next(next(iter(self.networks.values())).parameters()).device
        for key, statistics in self.statistics.items():
            statistics.to(device).merge_state(known[key].to(device))
            known[key].free()

    def sum_over_processes(self) -> None:
        """Sum the statistics over all processes."""
        sum_over_processes(list(self.statistics.values()))

    def check_finite(self) -> None:
        """Check the statistics for NaN and Inf.

        Raises:
            CalibrationError: if an activation is not finite. It names the first such space, and the tasks.
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
                    f"{name!r} (read by `{self.taps[name].reader}`). Check the weights of that model and the "
                    "calibration data for NaN or Inf. In 16-bit precision, an overflow is likely: calibrate with "
                    "precision='32-true'."
                )

    def take(self, space: str) -> Moments | None:
        """Remove and return the moments of a space.

        The statistics are freed when no other space needs them.

        Returns:
            The moments, or ``None`` if the space is not measured.
        """
        if space not in self.measured:
            return None
        key = self.measured.pop(space)
        moments = self.statistics[key].moments()
        if key not in self.measured.values():
            self.statistics.pop(key).free()
        return self._project(self.taps[space], moments)

    def _project(self, tap: Tap, moments: Moments) -> Moments:
        """Compute the moments of linear projections of the features: W C Wᵀ, summed over queries and keys."""
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
    """Return the size in bytes of a space's statistics: a float64 matrix over the features of all models."""
    tap = graph.spaces[space].tap
    return 0 if tap is None else 8 * (num_models * len(tap.block.starts)) ** 2


def check_counts(seen: Sequence[Mapping[int, int]], expected: Sequence[int | None]) -> None:
    """Compare the number of samples that all processes have seen with the sizes of the data sets.

    Args:
        seen: per process, the number of samples by loader index.
        expected: the size of each loader's data set, or ``None`` if it is unknown.

    Raises:
        CalibrationError: if samples were counted twice or skipped.
    """
    for loader, size in enumerate(expected):
        count = sum(counts.get(loader, 0) for counts in seen)
        if size is not None and count != size:
            raise CalibrationError(
                f"The processes have seen {count} samples of calibration loader {loader}, but its data set has "
                f"{size}: samples were {'counted twice' if count > size else 'skipped'}. Let the Trainer shard the "
                "data (`use_distributed_sampler=True`, the default). Do not shuffle, because each process would "
                "shuffle differently. Do not use a distributed sampler of your own, because it may repeat samples as "
                "padding."
            )
