"""One merge from first batch to finished network, without a Trainer: what driver, callback and CLI drive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_zipit._calibration.calibration import Calibration, check_counts
from lightning_zipit._calibration.fingerprint import digest_operators
from lightning_zipit._calibration.layout import Layout
from lightning_zipit._calibration.statistics_file import CalibrationStatistics, StatisticsRecord
from lightning_zipit._common.collectives import exchange, is_distributed, rank_and_size
from lightning_zipit._common.views import (
    Inputs,
    any_view,
    check_views,
    describe_sample,
    each_view,
    explain_views,
    like,
    view_of,
)
from lightning_zipit._matching.by_weights import common_start
from lightning_zipit._matching.families import split_families
from lightning_zipit._matching.matchings import Matched, Matchings
from lightning_zipit._merging.dense import rigid_note
from lightning_zipit._merging.maps import DenseMap, SpaceMap
from lightning_zipit._merging.rebuild import build_merged, build_stems
from lightning_zipit._merging.widths import FlopsModel, Plan, count_flops, find_choices
from lightning_zipit._report.report import Cost, MergeReport, measure_cost
from lightning_zipit.errors import (
    CalibrationError,
    ConfigurationError,
    UnknownShapeError,
    ZipItError,
)
from lightning_zipit.graph import FeatureSpace, MergeGraph
from lightning_zipit.graph.agreement import settle, trace_all
from lightning_zipit.graph.cut import find_cuts
from lightning_zipit.graph.joined import Joined
from lightning_zipit.graph.replay import working_copy
from lightning_zipit.graph.spaces import handed_over
from lightning_zipit.graph.taps import before_activations, tapped_by_all
from lightning_zipit.matchers import CCA, AnyWidthMatcher, Average, DualSpace
from lightning_zipit.merged import MergedBackbone
from lightning_zipit.paths import AllHeads
from lightning_zipit.refine import BatchNorm
from lightning_zipit.refine.batch_norm import has_batch_norm
from lightning_zipit.refine.refiner import Refiner
from lightning_zipit.refine.task_norms import find_norms, give_norms, set_affine
from lightning_zipit.settings import MergeSettings
from lightning_zipit.task_vectors import combine_into


class MergeSession:
    """Gathers, matches, merges and refines; its methods are called in that order, batch by batch.

    Args:
        backbones: the source networks by task; they are read, never changed.
        settings: what to do.
        base: the network that they were trained from, for ``settings.combine``.
        sources: the name of the model that each network is a part of, by task, where several are paths of one that was
            merged before; such a model counts by its tasks, unless ``settings.weights`` say otherwise.

    Raises:
        ConfigurationError: with every problem that can be known before any data is seen.
    """

    def __init__(
        self,
        backbones: Mapping[str, nn.Module],
        settings: MergeSettings,
        base: nn.Module | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        if (base is None) != (settings.combine is None):
            raise ConfigurationError(
                "`combine` adds up what training changed since `base`, the module that all sources were trained from: "
                f"give both or neither, got combine={settings.combine!r} and {'no' if base is None else 'a'} base."
            )
        self.backbones = dict(backbones)
        self.settings = settings
        self.base = base
        of_tasks = [sources[task] if sources else task for task in backbones]
        self._names = list(dict.fromkeys(of_tasks))  # of the models
        self._models = {task: self._names.index(name) for task, name in zip(backbones, of_tasks, strict=True)}
        self._weights = settings.weights_of(self._names)
        if self._weights is None and len(self._names) < len(backbones):
            self._weights = tuple(float(of_tasks.count(name)) for name in self._names)
        self.graphs: dict[str, MergeGraph] = {}
        self.merged: MergedBackbone | None = None
        self._layout = Layout()
        self._calibration: Calibration | None = None
        self._choices: dict[str, tuple[int, ...]] = {}  # per space, the widths that it may have
        self._size_notes: tuple[str, ...] = ()
        self._matchings = Matchings(settings.matcher, settings.measured_similarity, len(self._names))
        self._maps: dict[str, SpaceMap | DenseMap] = {}
        self._pass = 0
        self._refiner: Refiner | None = None
        self._record = StatisticsRecord(settings.statistics, self._lead(backbones)) if settings.statistics else None
        if self._record is not None:
            self._record.check_settings(settings.verify, start_at=settings.start_at, positions=settings.positions)
        # The graphs by stop_at, where the statistics serve other merges too.
        self._cuts: dict[str | None, dict[str, MergeGraph]] = {}
        self._seen: dict[int, int] = {}
        self.expected: Sequence[int | None] = ()
        if self._record is not None and self._record.complete is not None:
            known = self._record.complete
            self._example: Inputs = known.example_of(list(self.backbones))
            self.graphs = self._trace(self._example, barriers=known.barriers_of(settings.last_module))
            self._record.check_operators(self._lead_graphs())
            warn_of_barriers(self._graph)
            self._choose_from(self._example)
            self.calibration_passes = 0
            return
        with suppress(UnknownShapeError):  # traced again on the first batch, if its size is another
            self.graphs = self._trace()
        self.calibration_passes = max(1, len(self._turns())) if self.graphs else 1
        if self._record is not None and self.calibration_passes > 1:
            raise ConfigurationError(
                f"The statistics take more than statistics_memory={settings.statistics_memory} GiB, so that they would "
                f"be gathered in {self.calibration_passes} passes, and a statistics file takes one: give more "
                "`statistics_memory`, or no `statistics`."
            )

    def _lead(self, networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Of every model the network of its first task, which stands for its trunk."""
        return {name: networks[task] for name, task in zip(self._names, self._leading(), strict=True)}

    def _lead_graphs(self) -> dict[str, MergeGraph]:
        return {name: self.graphs[task] for name, task in zip(self._names, self._leading(), strict=True)}

    def _leading(self) -> list[str]:
        """Of every model its first task."""
        first = {number: task for task, number in reversed(self._models.items())}
        return [first[number] for number in range(len(self._names))]

    @property
    def passes(self) -> int:
        """How often the calibration data is gone through: for statistics, and for batch norm."""
        how = self.settings.refinement
        if isinstance(how, BatchNorm) and not any(map(has_batch_norm, self.backbones.values())):
            how = None
        return self.calibration_passes + (how is not None)

    def calibrate(self, x: Inputs, networks: Mapping[str, nn.Module], index: int = 0, loader: int = 0) -> None:
        """First passes: add a batch to the statistics of the spaces whose turn it is.

        Args:
            x: an input of the backbones, or one of each by task.
            networks: the source networks or copies of them, in eval mode, where ``x`` is.
            index: the number of the pass, below :attr:`calibration_passes`.
            loader: the number of the dataloader that ``x`` comes from.

        Raises:
            CalibrationError: if the first batch gives NaN or Inf, or a network cannot take it.
            StatisticsError: if the batches are not those of the calibration that is resumed.
            VerificationError: if the table of axes proves wrong everywhere.
        """
        if index != self._pass:
            self._match()
            self._pass = index
        x, first = check_views(x, self.backbones), self._calibration is None
        if self._calibration is None:
            self._calibration = self._start(x, networks)
        before, count = self._seen.get(loader, 0), len(any_view(x))
        if index == 0:
            self._seen[loader] = before + count
        if self._record is not None and self._record.is_known(loader, before, count):
            return
        self._calibration.update(self._layout(x, networks))
        if first:
            self._calibration.check_finite()
        if self._record is not None:
            self._record.keep(lambda: self._gathered(partly=True))

    def _gathered(self, partly: bool = False) -> CalibrationStatistics:
        """What the calibration has gathered, of this process alone or (in the end) of all."""
        assert self._calibration is not None and self._record is not None
        dtype, shape = describe_sample(any_view(self._example))
        return CalibrationStatistics(
            self._record.fingerprints,
            shape,
            dtype,
            self._graph.barriers,
            self._calibration.statistics,
            self._seen if partly else {},
            {stop_at or "": next(iter(graphs.values())).barriers for stop_at, graphs in self._cuts.items()},
            self.settings.start_at,
            () if isinstance(self._example, Tensor) else tuple(map(describe_sample, self._example.values())),
            self.settings.positions,
            self.settings.verify,
            {name: digest_operators(graph) for name, graph in self._lead_graphs().items()},
        )

    def _start(self, x: Inputs, networks: Mapping[str, nn.Module]) -> Calibration:
        task = next(iter(networks))
        if self._pass == 0:
            self._example = each_view(x, lambda view: torch.zeros_like(view[:1], device="cpu"))
            example, device = each_view(x, lambda view: view[:8].detach()), any_view(x).device.type
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                self.graphs = self._prove(self.graphs, networks, example)
                self._choose_from(example)
                self._cuts = self._find_cuts(networks, example)
            warn_of_barriers(self.graphs[task])
        calibration = self._measuring(networks)
        if self._record is not None and self._record.resumed is not None:
            self._record.check_operators(self._lead_graphs())
            calibration.restore(self._record.resumed.statistics)
        return calibration

    def _trace(self, example: Inputs | None = None, **arguments: Any) -> dict[str, MergeGraph]:
        fitting = None if example is None else like(example, self._first)
        joined = [network for network in self.backbones.values() if isinstance(network, Joined)]
        arguments.setdefault("barriers", {node: why for each in joined for node, why in each.barriers.items()})
        arguments = {"stop_at": self.settings.last_module, "start_at": self.settings.start_at, **arguments}
        graphs = trace_all(self.backbones, merge_heads=self.settings.merge_heads, example=fitting, **arguments)
        graph = next(iter(graphs.values()))
        if self.settings.norms_per_task and not find_norms(graph.module, list(graph.trunk_graph())):
            raise ConfigurationError(
                "refine=BatchNorm(per_task=True) needs batch norm in the trunk, and there is none: use another `refine`"
                ", or let the trunk end later (`stop_at`)."
            )
        return graphs

    def _prove(
        self, graphs: dict[str, MergeGraph], networks: Mapping[str, nn.Module], example: Inputs, **arguments: Any
    ) -> dict[str, MergeGraph]:
        """Graphs that fit an example and, where the settings ask for it, are proved on it."""
        shapes = {task: view_of(example, task).shape[1:] for task in networks}
        if not graphs or any(graph.input_shape != shapes[task] for task, graph in graphs.items()):
            try:
                graphs = self._trace(example, **arguments)
            except ZipItError as error:
                if not isinstance(example, Tensor) or self.settings.start_at is None:
                    raise
                raise type(error)(f"{error} {explain_views(networks)}") from error
        views = {task: view_of(example, task) for task in networks}

        def trace_again(barriers: dict[str, str]) -> dict[str, MergeGraph]:
            return self._trace(example, **{**arguments, "barriers": barriers})

        return settle(networks, graphs, views, trace_again, self.settings.verify, self.settings.merge_heads)

    def _find_cuts(self, networks: Mapping[str, nn.Module], example: Inputs) -> dict[str | None, dict[str, MergeGraph]]:
        """The graphs of every cut that the statistics shall serve."""
        cuts = {self.settings.last_module: self.graphs} if self.settings.also else {}
        for stop_at in dict.fromkeys(other.last_module for other in self.settings.also):
            if stop_at not in cuts:
                with suppress(ZipItError):  # the merge with this cut will say so
                    cuts[stop_at] = self._prove({}, networks, example, stop_at=stop_at)
        return cuts

    def _choose_from(self, example: Inputs) -> None:
        """Find the widths that there are to choose from."""
        graph, settings = self._graph, self.settings
        own = view_of(like(example, self._first), next(iter(self.backbones)))
        found = find_choices(graph, working_copy(self._first), own, settings.width, len(self._names))
        self._choices, self._size_notes = found
        if settings.flops is not None:
            flops = self._flops_model(self.graphs)
            least = flops({name: widths[0] for name, widths in self._choices.items()}) / flops.source
            if settings.flops < least:
                raise ConfigurationError(
                    f"A merged network of these sources has {least:.2f} times the FLOPs of one at least, more than "
                    f"flops={settings.flops}: give it more, or cut it elsewhere with `stop_at`."
                )

    def _flops_model(self, graphs: Mapping[str, MergeGraph]) -> FlopsModel:
        return FlopsModel.of(list(graphs.values()), self._flop_counts)

    @cached_property
    def _flop_counts(self) -> list[dict[str, float]]:
        """Of every network, by module."""
        example = like(self._example, self._first)
        return [count_flops(network, view_of(example, task)) for task, network in self.backbones.items()]

    def _measuring(self, networks: Mapping[str, nn.Module]) -> Calibration:
        spaces: list[str] | None = [name for family in self._families() for name in family]
        graphs = {task: as_measured(graph, self.settings) for task, graph in self.graphs.items()}
        others = [each for each in self.settings.also if each.last_module in self._cuts]
        if self._cuts:  # then there is one pass
            spaces = None
            for task, graph in graphs.items():
                cuts = [as_measured(self._cuts[each.last_module][task], each) for each in others]
                graphs[task] = tapped_by_all([graph, *cuts])
        leads = {task: networks[task] for task in self._leading()}
        return Calibration(next(iter(graphs.values())), leads, spaces, positions=self.settings.positions, graphs=graphs)

    def _families(self) -> list[list[str]]:
        """The families of spaces whose turn it is in this pass; more turns than passes are taken in the last one."""
        last = self._pass >= self.calibration_passes - 1
        return [family for turn in self._turns()[self._pass : None if last else self._pass + 1] for family in turn]

    def _turns(self) -> list[list[list[str]]]:
        return split_families(self._graph, len(self._names), self.settings.statistics_memory * 2**30)

    def _match(self) -> None:
        """Match the spaces of this pass, from the statistics of all processes; each matches a part of them."""
        with torch.inference_mode(False), torch.no_grad():
            if self._record is not None and self._record.complete is not None:
                self._calibration = self._measuring(self.backbones)
                self._calibration.restore(self._record.complete.statistics)
                for unused in self._record.complete.statistics.values():
                    unused.free()
            else:
                self._complete_statistics()
            exchange(self._save)
            assert self._calibration is not None
            self._matchings.add(self._graph, self._families(), self._calibration, self._choices)
        if self._record is not None:
            self._record.discard()
        for statistics in self._calibration.statistics.values():
            statistics.free()
        self._calibration = None  # the statistics have served

    def _complete_statistics(self) -> None:
        """Look at what was gathered, and sum it over all processes."""
        if not any(exchange(lambda: self._calibration is not None)):
            raise CalibrationError(
                "No calibration batch was seen: the dataloaders are empty. Merging needs a few hundred samples."
            )
        exchange(self._check)
        check_counts(exchange(lambda: self._seen), self.expected)
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

    def _save(self) -> None:
        if self._record is not None and self._record.complete is None and rank_and_size()[0] == 0:
            self._gathered().save(self._record.path)

    def _choose(self) -> dict[str, Matched]:
        """Of every space, the matching of the width that it is to have; a budget may end the trunk earlier, too."""
        found = self._matchings.found
        if self.settings.flops is None:
            return {name: one for name, (one,) in found.items()}
        losses = {name: {one.space_map.width: one.loss for one in matched} for name, matched in found.items()}
        ends = [self.graphs, *(self._shorter() if self.settings.stop_at == "auto" else ())]
        plans = []
        for graphs in ends:
            spaces = next(iter(graphs.values())).spaces
            own = {name: losses[name] for name in found if name in spaces}
            plans.append(Plan.within(self._flops_model(graphs), own, self.settings.flops))
        best = min(range(len(plans)), key=lambda number: plans[number].loss)
        self.graphs = ends[best]
        return {
            name: next(one for one in found[name] if one.space_map.width == width)
            for name, width in plans[best].widths.items()
        }

    def _shorter(self) -> Iterator[dict[str, MergeGraph]]:
        """The graphs of trunks that end earlier, whose spaces are measured where they are in the whole of it."""
        whole = self._graph
        measured = as_measured(whole, self.settings).spaces
        for stop_at in find_cuts(whole):
            try:
                graphs = self._trace(self._example, stop_at=stop_at, barriers=whole.barriers)
            except ZipItError:
                continue
            spaces = as_measured(next(iter(graphs.values())), self.settings).spaces
            if all(name in measured and _place(measured[name]) == _place(space) for name, space in spaces.items()):
                yield graphs

    @property
    def _first(self) -> nn.Module:
        return next(iter(self.backbones.values()))

    @property
    def _graph(self) -> MergeGraph:
        """The merge graph of the first network."""
        return next(iter(self.graphs.values()))

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
            leads = list(self._lead(self.backbones).values())
            self._matchings.finish(self._graph, leads, self._choices)
            chosen = self._choose()
            graphs = [self.graphs[task] for task in self.backbones]
            self._maps = maps = {name: replace(one.space_map, weights=self._weights) for name, one in chosen.items()}
            graph, networks = graphs[0], list(self.backbones.values())
            trunk, built = build_merged(graphs, networks, maps, self._weights, list(self._models.values()))
            heads: dict[str, nn.Module] = dict(zip(self.backbones, built, strict=True))
            stems: dict[str, nn.Module] = dict(zip(self.backbones, build_stems(graphs, maps), strict=False))
            if self.settings.combine is not None and self.base is not None:
                combine_into(trunk, leads, self.base, self.settings.combine)
            if self.settings.norms_per_task:
                give_norms(trunk, heads)
                set_affine(trunk, self.backbones, graph.axes, maps, self._models)
            spaces = tuple(chosen[name].report for name in graph.spaces)
            report = MergeReport(
                spaces, *self._costs(AllHeads(trunk, heads, stems)), self._notes(graph), models=tuple(self._names)
            )
        widths = {name: one.width for name, one in maps.items() if one.width != graph.spaces[name].size}
        self.merged = MergedBackbone(trunk, heads, report, self._example, self.graphs, widths, stems)
        return self.merged

    def _notes(self, graph: MergeGraph) -> tuple[str, ...]:
        """What people should know of the merge."""
        notes = graph.notes + self._size_notes
        matcher = self.settings.matcher
        if self._weights is not None:
            counts = ", ".join(f"{task} {one:g}" for task, one in zip(self._names, self._weights, strict=True))
            notes += (f"Where features became one, models counted by their weights: {counts}.",)
        if self.settings.stop_at == "auto":
            notes += (f"The trunk ends at {f'`{graph.stop_at}`' if graph.stop_at else 'the last layer'}.",)
        if any(isinstance(one, DenseMap) for one in self._maps.values()) or isinstance(matcher, CCA):
            notes += rigid_note(graph)
        if self.settings.norms_per_task:
            notes += ("Batch norm is per task: the trunk runs once for each task, which merged FLOPs count.",)
        if graph.stem_nodes:
            notes += ("Each task has a stem: stem and trunk run once for each task, which merged FLOPs count.",)
            if isinstance(matcher.matcher if isinstance(matcher, DualSpace) else matcher, AnyWidthMatcher):
                names = ", ".join(f"`{name}`" for name in sorted(handed_over(graph)))
                notes += (f"Matched one to one, as stems hand it over: {names}.",)
        if not isinstance(matcher, Average):
            notes += common_start(graph, list(self._lead(self.backbones).values()), self._maps)
        return notes

    def _costs(self, merged: nn.Module) -> tuple[dict[str, Cost], Cost]:
        x = like(self._example, self._first)
        sources = {}
        for task, network in self.backbones.items():
            sources[task] = measure_cost(network, view_of(x, task))
        return sources, measure_cost(merged, x)

    def start_refining(self, networks: Mapping[str, nn.Module], device: torch.device) -> None:
        """Between the passes: make copies of the merged networks that run where the calibration does.

        Args:
            networks: the networks that the calibration used.
            device: where the batches are.
        """
        assert self.merged is not None and self.settings.refinement is not None
        how = self.settings.refinement
        self._refiner = Refiner(self.merged, networks, how, self._maps, device, self._weights, self._models)

    def refine(self, x: Inputs, tasks: Iterable[str]) -> None:
        """Last pass: refine the merged networks by a batch.

        Args:
            x: an input of the backbones, or one of each by task.
            tasks: the tasks that the batch belongs to.
        """
        assert self._refiner is not None
        self._refiner.add(self._layout(check_views(x, self.backbones), self._refiner.networks), tasks)

    def finish_refining(self) -> None:
        """After the last pass: take what was refined over into the merged networks.

        Raises:
            CalibrationError: if a batch norm has seen fewer than two samples, or there is NaN or Inf.
        """
        assert self._refiner is not None
        self.merged = self._refiner.finish()
        self._refiner = None


def merge_backbones(
    backbones: Mapping[str, nn.Module],
    batches: Sequence[Iterable[Inputs]] | Iterable[Inputs],
    settings: MergeSettings | None = None,
    base: nn.Module | None = None,
) -> MergedBackbone:
    """Merge plain networks, without a Trainer.

    Args:
        backbones: the source networks by task, on one device; they are left as they are.
        batches: inputs, to be gone through several times: a list with one iterable per task, or one iterable for all.
            An input is a tensor for all networks, or a dict by task with one for each.
        settings: what to do; by default everything down to the last layer is zipped.
        base: the network that they were trained from, for ``settings.combine``.

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
    session = MergeSession(backbones, settings or MergeSettings(), base)
    per_task = isinstance(batches, (list, tuple)) and batches and not isinstance(batches[0], (Tensor, Mapping))
    loaders: list[Iterable[Inputs]] = list(batches) if per_task else [batches]  # type: ignore[list-item, arg-type]
    if per_task and len(loaders) != len(backbones):
        raise ConfigurationError(
            f"{len(loaders)} sets of batches were given for {len(backbones)} tasks: give one each."
        )
    tasks = list(backbones)
    networks = {task: working_copy(network) for task, network in session.backbones.items()}
    with torch.no_grad():
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


def as_measured(graph: MergeGraph, settings: MergeSettings) -> MergeGraph:
    """A graph whose spaces are tapped where a merge of these settings looks at them, if it does."""
    matcher = settings.matcher
    if settings.before_activations:
        graph = before_activations(graph)
    if isinstance(matcher, DualSpace) and matcher.tau == 1:  # by weights alone
        graph = replace(graph, spaces={name: replace(space, tap=None) for name, space in graph.spaces.items()})
    return graph


def warn_of_barriers(graph: MergeGraph) -> None:
    """Say what stays per task although the trunk should have held it."""
    if graph.barriers:
        rank_zero_warn("Part of the trunk could not be merged and stays per task. " + " ".join(graph.barriers.values()))


def _place(space: FeatureSpace) -> tuple[str | None, int]:
    """Where a space is measured."""
    return None if space.tap is None else space.tap.key, space.size
