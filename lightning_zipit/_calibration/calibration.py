"""Runs the source models over calibration data, in lockstep, and gathers the statistics of every space."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_zipit._calibration.folding import Folds
from lightning_zipit._calibration.statistics import FeatureStatistics, Moments, empty_like_features, sum_over_processes
from lightning_zipit._common.views import Inputs, any_view, view_of
from lightning_zipit.errors import CalibrationError, StatisticsError
from lightning_zipit.graph import MergeGraph, Tap
from lightning_zipit.graph.record import IN_PLACE


class Lockstep:
    """Runs the trunks of N networks of one architecture side by side, one node of the graph at a time.

    Every activation is dropped after its last use, so that the peak memory is that of N plain forwards. Batch norm is
    computed with the convolution in front of it.

    Args:
        graph: the merge graph of the networks.
        networks: the networks, each in the mode and on the device that it shall run in.
        graphs: the merge graph of each, where they have stems of their own.
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
        self.stems = [Beginning(own, network) for own, network in pairs] if graph.stem_nodes else []
        self.interpreters = [fx.Interpreter(network, graph=graph.fx_graph) for network in networks]
        self.folds = Folds(networks, self.nodes, observed)
        last_use = {source: node for node in self.nodes for source in (node, *node.all_input_nodes)}
        self.finished: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for source, node in last_use.items():
            self.finished[node].append(source)

    def run(self, views: Sequence[Tensor], observe: Callable[[str, list[Tensor]], None]) -> None:
        """Run all networks on one batch.

        Args:
            views: the input of each.
            observe: called after each node with its name and its value in every network; a layer whose batch norm is
                computed with it has the value of its norm.
        """
        try:
            for interpreter, stem, x in zip(self.interpreters, self.stems, views, strict=bool(self.stems)):
                interpreter.env.update(zip(self.entries, stem.run(x), strict=True))
            for node in self.entries:
                observe(node.name, [interpreter.env[node] for interpreter in self.interpreters])
            for node in self.nodes:
                for interpreter, x in zip(self.interpreters, views, strict=True):
                    if not self.folds.run(interpreter, node):
                        interpreter.env[node] = run_node(interpreter, node, x)
                observe(node.name, [interpreter.env[node] for interpreter in self.interpreters])
                for interpreter in self.interpreters:
                    for source in self.finished[node]:
                        del interpreter.env[source]
        finally:
            for interpreter in self.interpreters:
                interpreter.env.clear()


class Beginning:
    """Runs what a network has before the trunk.

    Args:
        graph: its merge graph.
        network: the network.
    """

    def __init__(self, graph: MergeGraph, network: nn.Module) -> None:
        self.nodes = list(graph.stem_graph())
        self.handed = [entry.node for entry in graph.entries]
        self.interpreter = fx.Interpreter(network, graph=graph.fx_graph)

    def run(self, x: Tensor) -> list[Any]:
        """What the stem hands over."""
        values: dict[str, Any] = {}
        try:
            for node in self.nodes:
                value = self.interpreter.env[node] = run_node(self.interpreter, node, x)
                if node.name in self.handed:
                    values[node.name] = value
                for source in self.interpreter.user_to_last_uses.get(node, ()):
                    self.interpreter.env.pop(source, None)
        finally:
            self.interpreter.env.clear()
        return [values[name] for name in self.handed]


def run_node(interpreter: fx.Interpreter, node: fx.Node, x: Tensor) -> Any:
    """The value of one node, from those before it."""
    if node.op == "placeholder":
        return x.clone()  # an operator that works in place must not change what the next network sees
    if node.meta.get(IN_PLACE):
        return operator.iadd(*fx.node.map_arg(node.args, interpreter.env.__getitem__))
    return interpreter.run_node(node)


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
        self._marks: Tensor | None = None  # of the samples of this batch
        self._chosen: dict[int, Tensor] = {}  # positions of each of them, by how many there are
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
            self._marks = None if self.positions is None else marks(any_view(x))
            self._chosen.clear()
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
            features = [self._choose(tap.features(value)) for value in values]
            if key not in self._waiting:
                if features[0][0].numel() > statistics.few:
                    statistics.update(features, features_first=True)
                    continue
                self._waiting[key] = Waiting(statistics, features)
            self._waiting[key].add(features)

    def _choose(self, features: Tensor) -> Tensor:
        """Some positions of every sample, ``(features, batch, …)`` to ``(features, batch, positions)``."""
        if self._marks is None or features.ndim < 3 or features.shape[1] % len(self._marks):
            return features
        assert self.positions is not None
        batch, size = features.shape[1], features[0, 0].numel()
        if size <= self.positions:
            return features
        if size not in self._chosen:
            self._chosen[size] = choose_positions(self._marks, size, self.positions)
        index = self._chosen[size].repeat_interleave(batch // len(self._marks), 0)  # windows are samples
        if features.stride(0) == 1:  # the features of a position lie next to each other
            rows = features.flatten(1).T
            index = index + size * torch.arange(batch, device=index.device)[:, None]
            return rows.index_select(0, index.flatten()).view(batch, -1, rows.shape[1]).movedim(2, 0)
        return features.flatten(2).gather(2, index.expand(len(features), -1, -1))

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


class Waiting:
    """Samples that are added to statistics together, once they are more than the features of a model.

    Args:
        statistics: what they are added to.
        features: the first of them, of each model ``(C_i, samples, …)``.
    """

    def __init__(self, statistics: FeatureStatistics, features: Sequence[Tensor]) -> None:
        self.statistics = statistics
        first = features[0].flatten(1)
        room = first[:, :1].expand(-1, statistics.few + first.shape[1])
        with torch.inference_mode(False):  # may then be written to in either mode
            self.rows = empty_like_features(sum(statistics.sizes), room, first.dtype)
        self.filled = 0

    def add(self, features: Sequence[Tensor]) -> None:
        """Copy samples of each model, ``(C_i, samples, …)``: no operator that works in place can change them here."""
        samples = features[0][0].numel()
        if self.filled + samples > self.rows.shape[1]:  # a batch larger than the first
            self.flush()
        if samples > self.rows.shape[1]:
            self.statistics.update(features, features_first=True)
            return
        free = self.rows[:, self.filled : self.filled + samples].unflatten(1, features[0].shape[1:])
        for part, feature in zip(free.split(self.statistics.sizes), features, strict=True):
            part.copy_(feature)
        self.filled += samples
        if self.filled > self.statistics.few:
            self.flush()

    def flush(self) -> None:
        """Add what waits."""
        if self.filled:
            self.statistics.consume(self.rows[:, : self.filled])
            self.filled = 0


def marks(x: Tensor) -> Tensor:
    """A number for each sample of a batch that depends on nothing but its content, ``(batch,)``."""
    return x.detach().contiguous().view(torch.uint8).flatten(1).sum(1, dtype=torch.int64)


def choose_positions(marks: Tensor, size: int, count: int) -> Tensor:
    """Positions that look random and depend on the sample alone: the same on whatever process it is seen.

    Args:
        marks: ``(batch,)``, see :func:`marks`.
        size: how many positions there are.
        count: how many to choose, at most ``size``.

    Returns:
        ``(batch, count)``, all different: a run of one fixed permutation, which begins at the sample's mark.
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size)).to(marks.device)
    return order[(marks[:, None] + torch.arange(count, device=marks.device)) % size]


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
