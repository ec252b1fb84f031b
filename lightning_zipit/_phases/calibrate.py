"""The phase *calibrate*: measure the features of the sources over the batches of one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lightning_zipit._calibration.calibration import Calibration, check_counts, statistics_bytes
from lightning_zipit._calibration.fingerprint import digest_operators
from lightning_zipit._calibration.statistics_file import CalibrationStatistics, StatisticsRecord
from lightning_zipit._common.collectives import exchange, is_distributed, rank_and_size
from lightning_zipit._common.samples import describe_inputs
from lightning_zipit._common.sources import Sources
from lightning_zipit._common.views import Inputs, any_view
from lightning_zipit._phases.prepare import Graphs, Traced
from lightning_zipit.graph import MergeGraph
from lightning_zipit.graph.taps import before_activations, tapped_by_all
from lightning_zipit.settings import MergeSettings


def as_measured(graph: MergeGraph, settings: MergeSettings) -> MergeGraph:
    """Move the taps of a graph to the points where a merge with these settings measures its feature spaces."""
    if settings.before_activations:
        graph = before_activations(graph)
    if not settings.matcher.needs_data:
        graph = replace(graph, spaces={name: replace(space, tap=None) for name, space in graph.spaces.items()})
    return graph


def memory_of(merges: Iterable[tuple[MergeGraph, MergeSettings]], num_models: int) -> int:
    """Compute the bytes of the statistics that several merges need together."""
    tapped = tapped_by_all([as_measured(graph, settings) for graph, settings in merges])
    return sum(statistics_bytes(tapped, name, num_models) for name in tapped.spaces)


def measuring(
    traced: Traced,
    sources: Sources,
    settings: MergeSettings,
    networks: Mapping[str, nn.Module],
    spaces: Sequence[str],
) -> Calibration:
    """Start the statistics of some feature spaces.

    Args:
        traced: the traced sources.
        sources: the source networks.
        settings: the options of the merge.
        networks: copies of the source networks, by task.
        spaces: the feature spaces to measure. If the statistics serve several merges, all spaces of all merges are
            measured instead.

    Returns:
        Statistics without samples.
    """
    graphs: Graphs = {task: as_measured(graph, settings) for task, graph in traced.graphs.items()}
    if traced.cuts:
        served = [each for each in settings.also if each.last_module in traced.cuts]
        for task, graph in graphs.items():
            others = [as_measured(traced.cuts[each.last_module][task], each) for each in served]
            graphs[task] = tapped_by_all([graph, *others])
    leads = sources.of_models({task: task for task in networks}).values()
    return Calibration(
        next(iter(graphs.values())),
        {task: networks[task] for task in leads},
        None if traced.cuts else spaces,
        positions=settings.positions,
        graphs=graphs,
    )


@dataclass
class Gathering:
    """Accumulates the statistics of one pass over the calibration data.

    Args:
        calibration: the statistics, without samples.
        traced: the traced sources.
        sources: the source networks.
        settings: the options of the merge.
        file: the statistics file, from which an interrupted calibration resumes; ``None`` for no file.
    """

    calibration: Calibration
    traced: Traced
    sources: Sources
    settings: MergeSettings
    file: StatisticsRecord | None = None
    _seen: dict[int, int] = field(default_factory=dict)  # samples of each loader
    _started: bool = False

    def __post_init__(self) -> None:
        if self.file is not None and self.file.resumed is not None:
            self.file.check_operators(self.sources.of_models(self.traced.graphs))
            self.calibration.restore(self.file.resumed.statistics)

    def add(self, x: Inputs, loader: int) -> None:
        """Add a batch.

        Args:
            x: an input of the networks, or one input per task.
            loader: the index of the dataloader of the batch.

        Raises:
            CalibrationError: if the activations on the first batch contain NaN or Inf.
            StatisticsError: if the batches differ from the batches of the calibration that is resumed.
        """
        before, count = self._seen.get(loader, 0), any_view(x).samples
        self._seen[loader] = before + count
        if self.file is not None and self.file.is_known(loader, before, count):
            return
        self.calibration.update(x)
        if not self._started:
            self.calibration.check_finite()
            self._started = True
        if self.file is not None:
            self.file.keep(lambda: self._gathered(self._seen))

    def finish(self, expected: Sequence[int | None]) -> Calibration:
        """Check the statistics, sum them over all ranks, and save them.

        Args:
            expected: the number of samples in each loader's data set; ``None`` if it is unknown.

        Raises:
            CalibrationError: if activations contain NaN or Inf, or samples were counted twice or skipped.
        """
        exchange(self.calibration.check_finite)
        check_counts(exchange(lambda: self._seen), expected)
        if is_distributed():
            self.calibration.sum_over_processes()
        exchange(self._save)
        return self.calibration

    def _save(self) -> None:
        if self.file is not None and rank_and_size()[0] == 0:
            self._gathered({}).save(self.file.path)

    def _gathered(self, seen: dict[int, int]) -> CalibrationStatistics:
        assert self.file is not None
        traced, settings = self.traced, self.settings
        graphs = self.sources.of_models(traced.graphs)
        return CalibrationStatistics(
            self.file.fingerprints,
            describe_inputs(traced.example),
            traced.graph.barriers,
            self.calibration.statistics,
            seen,
            {stop_at or "": next(iter(cut.values())).barriers for stop_at, cut in traced.cuts.items()},
            settings.start_at,
            settings.positions,
            settings.verify,
            {name: digest_operators(graph) for name, graph in graphs.items()},
        )
