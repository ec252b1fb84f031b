"""One merge from first batch to finished network, without a Trainer: what driver, callback and CLI drive."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_zipit.calibration import Calibration, statistics_bytes
from lightning_zipit.collectives import is_distributed, rank_and_size, share
from lightning_zipit.errors import (
    ArchitectureMismatchError,
    CalibrationError,
    ConfigurationError,
    UnknownShapeError,
    ZipItError,
)
from lightning_zipit.graph import MergeGraph, evaluating, trace
from lightning_zipit.graph.notes import reached
from lightning_zipit.graph.taps import before_activations
from lightning_zipit.graph.verify import find_failing
from lightning_zipit.matchers import Average, DualSpace, GreedyZip, Matcher
from lightning_zipit.merging import (
    SimilarityKind,
    SpaceMap,
    families,
    match,
    merge_into,
    similarity_from,
    unmerge_into,
)
from lightning_zipit.rebuild import build_head, build_trunk, set_unmerges
from lightning_zipit.refine import NAMED, BatchNorm, BatchNormEstimator, LayerByLayer, LeastSquares, Refinement
from lightning_zipit.refine.walk import Walk
from lightning_zipit.report import Cost, MergeReport, SpaceReport, measure_cost, report_space
from lightning_zipit.statistics_file import CalibrationStatistics, StatisticsRecord
from lightning_zipit.weight_matching import common_start, match_by_weights

Refine = Literal["batch_norm", "repair", "least_squares"] | Refinement
"""What follows merging: a refinement, or the name of one with its default settings."""


@dataclass(frozen=True)
class MergeSettings:
    """What a merge is asked to do.

    Attributes:
        stop_at: dotted name inside the backbone of the trunk's last module; ``None`` zips everything down to the last
            layer, which stays a head per task.
        matcher: similarity → labels.
        similarity: how alike features are: ``"correlation"``, ``"absolute"`` (its absolute value), ``"cosine"``, or
            ``"covariance"`` of their activations.
        refine: what follows merging: ``"batch_norm"`` re-estimates running statistics, ``"least_squares"`` fits every
            layer to the sources, ``"repair"`` gives it their means and deviations, ``None`` does nothing. Settings
            other than the default come with an instance, such as ``LeastSquares(positions=None)``.
        merge_heads: merge the last layer too, for models that share one output space.
        verify: prove the table of axes on the first calibration batch.
        statistics_memory: GiB that the statistics may take; where they need more, the calibration data is gone through
            several times, with the statistics of some spaces each time.
        statistics: a safetensors file for the statistics. One that is there stands for the calibration; else it is
            written, and an interrupted calibration goes on from what it had gathered.

    Raises:
        ConfigurationError: if an argument is not one of those there are.
    """

    stop_at: str | None = None
    matcher: Matcher = field(default_factory=GreedyZip)
    refine: Refine | None = "batch_norm"
    merge_heads: bool = False
    verify: bool = True
    statistics_memory: float = 8.0
    statistics: str | Path | None = None
    similarity: SimilarityKind = "correlation"

    def __post_init__(self) -> None:
        if self.similarity not in get_args(SimilarityKind):
            raise ConfigurationError(
                f"`similarity` must be one of {get_args(SimilarityKind)}, got {self.similarity!r}."
            )
        if not self.statistics_memory > 0:
            raise ConfigurationError(f"`statistics_memory` must be above 0 GiB, got {self.statistics_memory}.")
        if self.refine is not None and not isinstance(self.refine, Refinement) and self.refine not in NAMED:
            raise ConfigurationError(
                f"`refine` must be None, one of {list(NAMED)}, or an instance of one of "
                f"{[type(known).__name__ for known in NAMED.values()]}, got {self.refine!r}."
            )
        if not isinstance(self.matcher, Matcher):
            raise ConfigurationError(f"`matcher` must be a Matcher such as GreedyZip(), got {self.matcher!r}.")

    @property
    def refinement(self) -> Refinement | None:
        """What follows merging, with its settings."""
        return NAMED[self.refine] if isinstance(self.refine, str) else self.refine


@dataclass(frozen=True)
class MergedBackbone:
    """The networks that a merge made.

    Attributes:
        trunk: from the input to a tuple of what the heads take.
        heads: per task, from what the trunk hands over to the network's output.
        report: what the merge did.
        example: zeros of the shape and type of one calibration sample, ``(1, …)``.
        graphs: the merge graph of each source network.
    """

    trunk: nn.Module
    heads: dict[str, nn.Module]
    report: MergeReport
    example: Tensor
    graphs: dict[str, MergeGraph]


class MergeSession:
    """Gathers, matches, merges and refines; its methods are called in that order, batch by batch.

    Args:
        backbones: the source networks by task; they are read, never changed.
        settings: what to do.

    Raises:
        ConfigurationError: with every problem that can be known before any data is seen.
    """

    def __init__(self, backbones: Mapping[str, nn.Module], settings: MergeSettings) -> None:
        self.backbones = dict(backbones)
        self.settings = settings
        self.graphs: dict[str, MergeGraph] = {}
        self.merged: MergedBackbone | None = None
        self._calibration: Calibration | None = None
        self._maps: dict[str, SpaceMap] = {}
        self._reports: dict[str, SpaceReport] = {}
        self._similarities: dict[str, Tensor] = {}  # of all spaces, for a matcher that looks at them together
        self._pass = 0
        self._working: dict[str, nn.Module] = {}
        self._record = StatisticsRecord(settings.statistics, self.backbones) if settings.statistics else None
        self._seen: dict[int, int] = {}
        self.expected: Sequence[int | None] = ()
        if self._record is not None and self._record.complete is not None:
            known = self._record.complete
            self._example = known.example.clone()
            self.graphs = trace_all(self.backbones, settings, like(known.example, self._first), barriers=known.barriers)
            warn_of_barriers(next(iter(self.graphs.values())))
            self.calibration_passes = 0
            return
        with suppress(UnknownShapeError):  # traced again on the first batch, if its size is another
            self.graphs = trace_all(self.backbones, settings)
        self.calibration_passes = max(1, len(self._turns())) if self.graphs else 1
        if self._record is not None and self.calibration_passes > 1:
            raise ConfigurationError(
                f"The statistics take more than statistics_memory={settings.statistics_memory} GiB, so that they would "
                f"be gathered in {self.calibration_passes} passes, and a statistics file takes one: give more "
                "`statistics_memory`, or no `statistics`."
            )

    @property
    def passes(self) -> int:
        """How often the calibration data is gone through: for statistics, and for batch norm."""
        how = self.settings.refinement
        if isinstance(how, BatchNorm) and not any(map(has_batch_norm, self.backbones.values())):
            how = None
        return self.calibration_passes + (how is not None)

    def calibrate(self, x: Tensor, networks: Mapping[str, nn.Module], index: int = 0, loader: int = 0) -> None:
        """First passes: add a batch to the statistics of the spaces whose turn it is.

        Args:
            x: an input of the backbones.
            networks: the source networks or copies of them, in eval mode, where ``x`` is.
            index: the number of the pass, below :attr:`calibration_passes`.
            loader: the number of the dataloader that ``x`` comes from.

        Raises:
            CalibrationError: if the first batch gives NaN or Inf.
            StatisticsError: if the batches are not those of the calibration that is resumed.
            VerificationError: if the table of axes proves wrong everywhere.
        """
        if index != self._pass:
            self._match()
            self._pass = index
        first = self._calibration is None
        if self._calibration is None:
            self._calibration = self._start(x, networks)
        before = self._seen.get(loader, 0)
        if index == 0:
            self._seen[loader] = before + len(x)
        if self._record is not None and self._record.is_known(loader, before, len(x)):
            return
        self._calibration.update(x)
        if first:
            self._calibration.check_finite()
        if self._record is not None:
            self._record.keep(lambda: self._gathered(partly=True))

    def _gathered(self, partly: bool = False) -> CalibrationStatistics:
        """What the calibration has gathered, of this process alone or (in the end) of all."""
        assert self._calibration is not None and self._record is not None
        return CalibrationStatistics(
            self._record.fingerprints,
            tuple(self._example.shape[1:]),
            str(self._example.dtype).removeprefix("torch."),
            next(iter(self.graphs.values())).barriers,
            self._calibration.statistics,
            self._seen if partly else {},
        )

    def _start(self, x: Tensor, networks: Mapping[str, nn.Module]) -> Calibration:
        task = next(iter(networks))
        if self._pass == 0:
            self._example = torch.zeros_like(x[:1], device="cpu")
            example = x[:8].detach()
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                if not self.graphs or any(graph.input_shape != x.shape[1:] for graph in self.graphs.values()):
                    self.graphs = trace_all(self.backbones, self.settings, like(example, self._first))
                if self.settings.verify and find_failing(networks[task], self.graphs[task], example.clone()):
                    self.graphs = trace_all(self.backbones, self.settings, like(example, self._first), verify=True)
            warn_of_barriers(self.graphs[task])
        calibration = self._measuring(networks)
        if self._record is not None and self._record.resumed is not None:
            calibration.restore(self._record.resumed.statistics)
        return calibration

    def _measuring(self, networks: Mapping[str, nn.Module]) -> Calibration:
        graph = next(iter(self.graphs.values()))
        spaces = [name for family in self._families() for name in family]
        how = self.settings.refinement
        if isinstance(how, LeastSquares) and how.pre_activations:
            graph = before_activations(graph)
        by_weights = isinstance(self.settings.matcher, DualSpace) and self.settings.matcher.tau == 1
        return Calibration(graph, networks, [] if by_weights else spaces)

    def _families(self) -> list[list[str]]:
        """The families of spaces whose turn it is in this pass; more turns than passes are taken in the last one."""
        last = self._pass >= self.calibration_passes - 1
        return [family for turn in self._turns()[self._pass : None if last else self._pass + 1] for family in turn]

    def _turns(self) -> list[list[list[str]]]:
        graph = next(iter(self.graphs.values()))
        return split_families(graph, len(self.backbones), self.settings.statistics_memory * 2**30)

    def _match(self) -> None:
        """Match the spaces of this pass, from the statistics of all processes; each matches a part of them."""
        with torch.inference_mode(False), torch.no_grad():
            if self._record is not None and self._record.complete is not None:
                self._calibration = self._measuring(self.backbones)
                self._calibration.restore(self._record.complete.statistics)
            else:
                self._complete_statistics()
            if isinstance(self.settings.matcher, DualSpace):
                self._keep_similarities()
            else:
                for part in share(self._match_own_families):
                    self._take_over(part)
        if self._record is not None:
            self._record.discard()
        self._calibration = None  # the statistics have served

    def _complete_statistics(self) -> None:
        """Look at what was gathered, and sum it over all processes."""
        if not any(share(lambda: self._calibration is not None)):
            raise CalibrationError(
                "No calibration batch was seen: the dataloaders are empty. Merging needs a few hundred samples."
            )
        share(self._check)
        check_counts(share(lambda: self._seen), self.expected)
        assert self._calibration is not None
        if is_distributed():
            self._calibration.sum_over_processes()

    def _check(self) -> None:
        if self._calibration is None:
            raise CalibrationError(
                "A process has seen no calibration batch: there are fewer batches than processes. Use a smaller batch "
                "size, or fewer devices."
            )
        self._calibration.check_finite()

    def _take_over(self, matched: Mapping[str, tuple[SpaceMap, SpaceReport]]) -> None:
        for name, (space_map, report) in matched.items():
            self._maps[name], self._reports[name] = space_map, report

    def _keep_similarities(self) -> None:
        """On every process those of all spaces, as a space is matched by weights that depend on all others."""
        share(self._save)
        for name in (name for family in self._families() for name in family):
            similarity = self._similarity(name)
            if similarity is not None:
                self._similarities[name] = similarity.cpu()

    def _save(self) -> None:
        if self._record is not None and self._record.complete is None and rank_and_size()[0] == 0:
            self._gathered().save(self._record.path)

    def _similarity(self, space: str) -> Tensor | None:
        assert self._calibration is not None
        moments = self._calibration.take(space)
        return None if moments is None else similarity_from(moments, self.settings.similarity)

    def _match_by_weights(self, matcher: DualSpace) -> dict[str, tuple[SpaceMap, SpaceReport]]:
        graph, networks = self.graphs[next(iter(self.backbones))], list(self.backbones.values())
        matched = match_by_weights(graph, networks, self._similarities, matcher)
        self._similarities.clear()
        return {
            name: (space_map, report_space(graph.spaces[name], space_map, similarity))
            for name, (space_map, similarity) in matched.items()
        }

    def _match_own_families(self) -> dict[str, tuple[SpaceMap, SpaceReport]]:
        self._save()
        rank, processes = rank_and_size()
        graph, count = next(iter(self.graphs.values())), len(self.backbones)
        turns = self._families()
        costs = [sum(graph.spaces[name].size ** 2 for name in family) for family in turns]
        matched: dict[str, tuple[SpaceMap, SpaceReport]] = {}
        for number in split_evenly(costs, processes)[rank]:
            found = match(graph, turns[number], self._similarity, self.settings.matcher, count)
            for name, space_map, similarity in found:
                matched[name] = space_map, report_space(graph.spaces[name], space_map, similarity)
        return matched

    @property
    def _first(self) -> nn.Module:
        return next(iter(self.backbones.values()))

    def merge(self) -> MergedBackbone:
        """Match and merge, from the statistics of all processes.

        Returns:
            The merged networks, on the device and of the type of the source networks; batch norm is merged, and not yet
            re-estimated.

        Raises:
            CalibrationError: if there were no batches, or activations are NaN or Inf.
        """
        if self._pass < self.calibration_passes - 1:
            raise CalibrationError(
                f"The calibration data was gone through {self._pass + 1} times, but the statistics need "
                f"{self.calibration_passes} passes: give loaders that can be gone through again, or more "
                "`statistics_memory`."
            )
        self._match()
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(self.settings.matcher, DualSpace):
                self._take_over(self._match_by_weights(self.settings.matcher))
            tasks, maps = list(self.backbones), self._maps
            graph = self.graphs[tasks[0]]
            trunk = build_trunk(graph).eval()
            merge_into(trunk, list(self.backbones.values()), graph.axes, maps)
            heads: dict[str, nn.Module] = {}
            for source, task in enumerate(tasks):
                heads[task] = build_head(self.graphs[task]).eval()
                unmerge_into(heads[task], self.graphs[task].axes, maps, source)
                set_unmerges(heads[task], self.graphs[task], maps, source)
            spaces = tuple(self._reports[name] for name in graph.spaces)
            notes = graph.notes
            if not isinstance(self.settings.matcher, Average):
                notes += common_start(graph, list(self.backbones.values()), maps)
            report = MergeReport(spaces, *self._costs(trunk, heads), notes)
        self.merged = MergedBackbone(trunk, heads, report, self._example, self.graphs)
        return self.merged

    def _costs(self, trunk: nn.Module, heads: Mapping[str, nn.Module]) -> tuple[dict[str, Cost], Cost]:
        x = like(self._example, self._first)
        sources = {}
        for task, network in self.backbones.items():
            with evaluating(network):
                sources[task] = measure_cost(network, x)
        merged = measure_cost(AllHeads(trunk, heads), x)
        return sources, merged

    def start_refining(self, networks: Mapping[str, nn.Module], device: torch.device) -> None:
        """Between the passes: make a copy of the merged networks that runs where the calibration does.

        Args:
            networks: the networks that the calibration used.
            device: where the batches are.
        """
        assert self.merged is not None
        self._networks, dtype = dict(networks), next(next(iter(networks.values())).parameters()).dtype
        self._kept: list[Tensor] = []
        with torch.inference_mode(False):
            self._working = {
                name: copy.deepcopy(module).to(device=device, dtype=dtype).eval()
                for name, module in {"trunk": self.merged.trunk, **_prefixed(self.merged.heads)}.items()
            }
            self._estimator = BatchNormEstimator(self._working)

    def refine(self, x: Tensor, tasks: Iterable[str]) -> None:
        """Last pass: add a batch to the running statistics of the trunk and of the heads of ``tasks``, or keep it.

        Args:
            x: an input of the backbones.
            tasks: the tasks that the batch belongs to.
        """
        if isinstance(self.settings.refinement, LayerByLayer):
            self._kept.append(x)
            return
        if len(x) == 1:
            return  # a single sample has no variance
        trunk = self._working["trunk"]
        with self._estimator.collecting(trunk):
            crossing = trunk(x)
        for task in tasks:
            head = self._working[f"heads.{task}"]
            with self._estimator.collecting(head):
                head(*crossing)

    def finish_refining(self) -> None:
        """After the last pass: take what was refined over into the merged networks.

        Raises:
            CalibrationError: if a batch norm has seen no batch.
        """
        assert self.merged is not None
        how = self.settings.refinement
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(how, LayerByLayer):
                self._walk(how)
            else:
                self._estimator.finish()
            for name, module in {"trunk": self.merged.trunk, **_prefixed(self.merged.heads)}.items():
                for old, new in zip(
                    module.state_dict().values(), self._working[name].state_dict().values(), strict=True
                ):
                    old.copy_(new)
        self._working, self._networks, self._kept = {}, {}, []

    def _walk(self, how: LayerByLayer) -> None:
        assert self.merged is not None
        trunk, heads = self._working["trunk"], {task: self._working[f"heads.{task}"] for task in self.backbones}
        with torch.autocast(next(trunk.parameters()).device.type, enabled=False):
            walk = Walk(trunk, heads, self._networks, self.graphs, self._maps, self._kept, how)
            fits = walk.run()
        unfitted = walk.find_unfitted(fits) if isinstance(how, LeastSquares) else []
        note = (f"Kept the weights that merging gave them: {', '.join(f'`{name}`' for name in unfitted)}.",)
        notes = self.merged.report.notes + note * bool(unfitted)
        report = replace(self.merged.report, fits=fits, notes=notes)
        self.merged = replace(self.merged, report=report)


class AllHeads(nn.Module):
    """Trunk and heads as one network: all outputs of one input.

    Args:
        trunk: from the input to a tuple of what the heads take.
        heads: per task, the rest of the network.
    """

    def __init__(self, trunk: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict(heads)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        crossing = self.trunk(x)
        return {task: head(*crossing) for task, head in self.heads.items()}


def merge_backbones(
    backbones: Mapping[str, nn.Module],
    batches: Sequence[Iterable[Tensor]] | Iterable[Tensor],
    settings: MergeSettings | None = None,
) -> MergedBackbone:
    """Merge plain networks, without a Trainer.

    Args:
        backbones: the source networks by task, on one device; they are left as they are.
        batches: inputs, to be gone through several times: a list with one iterable per task, or one iterable for all.
        settings: what to do; by default everything down to the last layer is zipped.

    Returns:
        The merged networks.

    Raises:
        ConfigurationError: if the networks cannot be merged.
        CalibrationError: if the data cannot be used.

    Example:
        >>> def network():
        ...     return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
        >>> merged = merge_backbones({"a": network(), "b": network()}, [torch.randn(16, 1, 8, 8)])
        >>> merged.heads["b"](*merged.trunk(torch.randn(5, 1, 8, 8))).shape
        torch.Size([5, 2])
    """
    session = MergeSession(backbones, settings or MergeSettings())
    per_task = isinstance(batches, (list, tuple)) and batches and not isinstance(batches[0], Tensor)
    loaders: list[Iterable[Tensor]] = list(batches) if per_task else [batches]  # type: ignore[list-item]
    if per_task and len(loaders) != len(backbones):
        raise ConfigurationError(
            f"{len(loaders)} sets of batches were given for {len(backbones)} tasks: give one each."
        )
    tasks = list(backbones)
    networks = session.backbones
    with torch.no_grad(), ExitStack() as stack:
        for network in networks.values():
            stack.enter_context(evaluating(network))
        for index in range(session.calibration_passes):
            for number, loader in enumerate(loaders):
                for x in loader:
                    session.calibrate(x, networks, index, number)
        session.merge()
        if session.passes > session.calibration_passes:
            session.start_refining(networks, next(session._first.parameters()).device)
            for index, loader in enumerate(loaders):
                for x in loader:
                    session.refine(x, [tasks[index]] if per_task else tasks)
            session.finish_refining()
    assert session.merged is not None
    return session.merged


def split_families(graph: MergeGraph, num_models: int, limit: float) -> list[list[list[str]]]:
    """Families of spaces by turns, so that the statistics of one turn take no more memory than a limit.

    Args:
        graph: the merge graph.
        num_models: N.
        limit: bytes; a single family may take more.

    Returns:
        Per turn, its families.
    """
    turns: list[list[list[str]]] = []
    filled = math.inf
    for family in families(graph):
        size = sum(statistics_bytes(graph, name, num_models) for name in family)
        if filled + size > limit:
            turns.append([])
            filled = 0
        turns[-1].append(family)
        filled += size
    return turns


def split_evenly(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Share out pieces of work, the largest first, always to whom has the least.

    Args:
        costs: what each piece takes.
        parts: how many there are to share it.

    Returns:
        Per part, the numbers of its pieces.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        part = loads.index(min(loads))
        shares[part].append(number)
        loads[part] += costs[number]
    return shares


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


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a network has batch norm with running statistics."""
    return any(isinstance(child, _BatchNorm) and child.track_running_stats for child in module.modules())


def trace_all(
    backbones: Mapping[str, nn.Module],
    settings: MergeSettings,
    example: Tensor | None = None,
    verify: bool = False,
    barriers: Mapping[str, str] | None = None,
) -> dict[str, MergeGraph]:
    """Trace all source networks and make sure that their trunks are the same network.

    Args:
        backbones: the source networks by task.
        settings: where to cut them.
        example: an input of the networks, where their reshapes need one.
        verify: prove the table of the first network on the example; a space that fails becomes a barrier for all.
        barriers: nodes that shall stay in the heads, and why.

    Returns:
        The merge graph of each.

    Raises:
        ConfigurationError: with all differences.
        TraceError: if a network cannot be traced.
    """
    graphs: dict[str, MergeGraph] = {}
    problems: list[str] = []
    for task, backbone in backbones.items():
        try:
            graphs[task] = trace(
                backbone,
                settings.stop_at,
                example_input=example,
                merge_heads=settings.merge_heads,
                verify=example if verify and not graphs else None,
                barriers=next(iter(graphs.values())).barriers if graphs else barriers,
            )
        except ZipItError as error:
            if not graphs:
                raise
            problems.append(f"Task {task!r}: {error}")
            continue
        reference = next(iter(graphs))
        difference = first_difference(graphs[reference], graphs[task])
        if difference:
            problems.append(f"The networks of tasks {reference!r} and {task!r} differ: {difference}.")
    if problems:
        raise ArchitectureMismatchError.collect(problems)
    return graphs


def warn_of_barriers(graph: MergeGraph) -> None:
    """Say what stays per task although the trunk should have held it."""
    if graph.barriers:
        rank_zero_warn("Part of the trunk could not be merged and stays per task. " + " ".join(graph.barriers.values()))


def first_difference(first: MergeGraph, second: MergeGraph) -> str | None:
    """Where the trunks of two networks part, for people; ``None`` where they are the same network.

    The heads may differ: they are not merged.
    """
    nodes, others = list(first.trunk_graph()), list(second.trunk_graph())
    shapes, other_shapes = _trunk_shapes(first), _trunk_shapes(second)
    for name in (*shapes, *other_shapes):
        if shapes.get(name) != other_shapes.get(name):
            pair = f"{shapes.get(name)} in the first and {other_shapes.get(name)} in the second"
            return f"parameter `{name}` has shape {pair}"
    for node, other in zip(nodes, others, strict=False):
        operator, other_operator = (_operator(graph, item) for graph, item in ((first, node), (second, other)))
        if operator != other_operator:
            return f"node `{node.name}` is {operator} in the first and {other_operator} in the second"
    if len(nodes) != len(others):
        return f"one trunk has {len(nodes)} nodes and the other {len(others)}"
    if [crossing.node for crossing in first.crossings] != [crossing.node for crossing in second.crossings]:
        return "their heads read different values of the trunk"
    return None


def _trunk_shapes(graph: MergeGraph) -> dict[str, tuple[int, ...]]:
    tensors = dict((*graph.module.named_parameters(), *graph.module.named_buffers()))
    nodes = list(graph.trunk_graph())
    return {name: tuple(tensors[name].shape) for name in reached(nodes, set(nodes), tensors)}


def _operator(graph: MergeGraph, node: torch.fx.Node) -> str:
    if node.op == "call_module":
        return f"{graph.module.get_submodule(str(node.target))} with {node.args} {node.kwargs}"
    return f"{getattr(node.target, '__name__', node.target)} with {node.args} {node.kwargs}"


def like(x: Tensor, module: nn.Module) -> Tensor:
    """An input as a network takes it: on its device, and of its type where it is not whole numbers."""
    parameter = next(module.parameters())
    return x.to(parameter.device, parameter.dtype if x.is_floating_point() else None)


def _prefixed(heads: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {f"heads.{task}": head for task, head in heads.items()}
