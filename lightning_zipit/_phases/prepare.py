"""The phase *prepare*: trace the sources, prove the table of axes, and find the allowed widths of feature spaces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from lightning_zipit._calibration.statistics_file import CalibrationStatistics, StatisticsRecord
from lightning_zipit._common.calls import Call
from lightning_zipit._common.collectives import decide
from lightning_zipit._common.sources import Sources
from lightning_zipit._common.unmergeable import find_unmergeable
from lightning_zipit._common.views import Inputs, any_view, bound, each_view, explain_views, like, view_of
from lightning_zipit._merging.cost import FlopCounts, FlopsModel, count_flops
from lightning_zipit._merging.widths import find_choices
from lightning_zipit.errors import CalibrationError, ConfigurationError, UnknownShapeError, ZipItError
from lightning_zipit.graph import MergeGraph
from lightning_zipit.graph.guess import guess_input
from lightning_zipit.graph.joined import Joined, barriers_of
from lightning_zipit.graph.replay import working_copy
from lightning_zipit.graph.settle import settle, trace_all
from lightning_zipit.refine.task_norms import find_norms
from lightning_zipit.settings import MergeSettings

SAMPLES = 8
"""Maximum number of samples of the first batch on which the capture and the table of axes are checked."""

Graphs = dict[str, MergeGraph]
"""The merge graph of each source network, by task."""


@dataclass(frozen=True)
class Traced:
    """The traced and proved sources, before their features are measured.

    Attributes:
        graphs: the merge graph of each source network, by task.
        example: zeros of the shape and type of one sample, ``(1, …)``; a dict by task if tasks have different inputs.
        choices: the allowed widths of each feature space, in ascending order.
        notes: the feature spaces that keep their width, with reasons.
        cuts: the graphs of all merges that the same statistics serve, by ``stop_at``; empty for a single merge.
        flop_counts: the FLOPs of each network by node and weight; empty without a budget. See
            :func:`~lightning_zipit._merging.cost.count_flops`.
    """

    graphs: Graphs
    example: Inputs
    choices: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()
    cuts: Mapping[str | None, Graphs] = field(default_factory=dict)
    flop_counts: tuple[FlopCounts, ...] = ()

    @property
    def graph(self) -> MergeGraph:
        """The merge graph of the first network."""
        return next(iter(self.graphs.values()))

    def flops_model(self, graphs: Graphs) -> FlopsModel:
        """Return the FLOPs of a merged network as a function of its widths, for these graphs of the sources."""
        return FlopsModel.of(list(graphs.values()), self.flop_counts)


def make_sources(
    networks: Mapping[str, nn.Module],
    settings: MergeSettings,
    base: nn.Module | None = None,
    model_of: Mapping[str, str] | None = None,
) -> Sources:
    """Collect the sources of a merge, with the weight of each model.

    Args:
        networks: the source networks by task.
        settings: the options of the merge.
        base: the network from which all sources were trained, for ``combine``.
        model_of: the name of the model that each network belongs to, for models that are merged again. The weight of
            such a model is its number of tasks, unless the settings have weights.

    Raises:
        ConfigurationError: if a network has layers that cannot be merged, only one of ``combine`` and ``base`` is
            given, or the weights do not fit the models.
    """
    named = {f"Task {task!r}": network for task, network in networks.items()}
    named |= {} if base is None else {"`base`": base}
    if problems := [f"{who}: {problem}" for who, each in named.items() if (problem := find_unmergeable(each))]:
        raise ConfigurationError.collect(problems)
    if (base is None) != (settings.combine is None):
        raise ConfigurationError(
            "`combine` adds the changes of the sources since `base`, the module from which all sources were trained, "
            f"but got combine={settings.combine!r} and {'no' if base is None else 'a'} base. Give both or neither."
        )
    model_of = dict(model_of) if model_of else {task: task for task in networks}
    sources = Sources(dict(networks), model_of, base=base)
    weights = settings.weights_of(sources.models)
    if weights is None and len(sources.models) < len(networks):
        counts = Counter(model_of[task] for task in networks)
        weights = tuple(float(counts[name]) for name in sources.models)
    return replace(sources, weights=weights)


def open_file(sources: Sources, settings: MergeSettings) -> StatisticsRecord | None:
    """Open the statistics file of a merge; return ``None`` if the settings name no file.

    Raises:
        StatisticsError: if the file belongs to other networks or settings.
        ConfigurationError: if the file cannot be written.
    """
    if settings.statistics is None:
        return None
    file = StatisticsRecord(settings.statistics, sources.leads)
    file.check_settings(settings.verify, start_at=settings.start_at, positions=settings.positions)
    return file


def trace_sources(
    sources: Sources,
    settings: MergeSettings,
    example: Inputs | None = None,
    stop_at: str | None = None,
    barriers: Mapping[str, str] | None = None,
) -> Graphs:
    """Trace the source networks.

    Args:
        sources: the source networks.
        settings: the options of the merge.
        example: an input of the networks, or one input per task. Only reshapes of unknown sizes need it.
        stop_at: the trunk's last module.
        barriers: the nodes that stay in the heads, with reasons. By default, the barriers of sources that are merged
            again.

    Returns:
        The merge graph of each network.

    Raises:
        ConfigurationError: if the networks differ in architecture, or do not fit the settings.
        TraceError: if a network cannot be traced.
    """
    if barriers is None:
        merged_before = [network for network in sources.networks.values() if isinstance(network, Joined)]
        barriers = {node: why for network in merged_before for node, why in barriers_of(network).items()}
    graphs = trace_all(
        sources.networks,
        stop_at,
        settings.merge_heads,
        None if example is None else like(example, sources.first),
        barriers,
        settings.start_at,
    )
    graph = next(iter(graphs.values()))
    if settings.norms_per_task and not find_norms(graph.module, list(graph.trunk_graph())):
        raise ConfigurationError(
            "refine=BatchNorm(per_task=True) needs batch norm in the trunk, but the trunk has none. Use another "
            "`refine`, or end the trunk at a later module with `stop_at`."
        )
    return graphs


def trace_without_data(sources: Sources, settings: MergeSettings) -> Graphs:
    """Trace the source networks without an input; return an empty dict if the shape of an input must be known."""
    with suppress(UnknownShapeError, CalibrationError):  # the meta device may take a guess that the network does not
        return trace_sources(sources, settings, stop_at=settings.last_module)
    return {}


@dataclass(frozen=True)
class _Decided:
    """Decisions of rank 0 for all ranks: barriers of each cut, widths and notes."""

    barriers: dict[str, str]
    cuts: dict[str | None, dict[str, str]]
    choices: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]


def prepare(
    sources: Sources,
    settings: MergeSettings,
    networks: Mapping[str, nn.Module],
    x: Inputs,
    graphs: Graphs,
) -> Traced:
    """Trace and prove the sources on the first batch. Rank 0 decides which nodes are barriers, and all ranks use them.

    Args:
        sources: the source networks.
        settings: the options of the merge.
        networks: copies of the networks in eval mode, on the device of the batch.
        x: the first batch.
        graphs: graphs that were traced without data. They are used if they fit the batch.

    Raises:
        ConfigurationError: if the networks cannot be merged with these settings.
        TraceError: if a network cannot be traced.
        VerificationError: if no feature space passes the proof.
    """
    first = each_view(x, lambda view: view.first(SAMPLES).each(Tensor.detach))
    example = each_view(x, Call.blank)
    found: list[Traced] = []

    def look() -> _Decided:
        proved = _prove(sources, settings, networks, first, graphs, settings.last_module)
        cuts = _find_cuts(sources, settings, networks, first, proved)
        found.append(_with_choices(Traced(proved, example, {}, cuts=cuts), sources, settings, first))
        traced = found[0]
        of_cuts = {stop_at: next(iter(each.values())).barriers for stop_at, each in cuts.items()}
        return _Decided(traced.graph.barriers, of_cuts, dict(traced.choices), traced.notes)

    with torch.inference_mode(False), torch.no_grad(), torch.autocast(any_view(x).device.type, enabled=False):
        decided = decide(look)
        return found[0] if found else _follow(decided, sources, settings, first, example)


def _follow(decided: _Decided, sources: Sources, settings: MergeSettings, first: Inputs, example: Inputs) -> Traced:
    """Trace the sources with the barriers of rank 0."""
    again = partial(trace_sources, sources, settings, first)
    own = again(settings.last_module, decided.barriers)
    cuts = {
        stop_at: own if stop_at == settings.last_module else again(stop_at, barriers)
        for stop_at, barriers in decided.cuts.items()
    }
    return Traced(own, example, decided.choices, decided.notes, cuts, _flop_counts(own, sources, settings, first))


def prepare_from(sources: Sources, settings: MergeSettings, known: CalibrationStatistics) -> Traced:
    """Trace the sources with the example and barriers of a statistics file, without data.

    Args:
        sources: the source networks.
        settings: the options of the merge.
        known: the statistics of these networks.
    """
    example = bound(known.example_of(sources.tasks), sources.networks)
    graphs = trace_sources(sources, settings, example, settings.last_module, known.barriers_of(settings.last_module))
    return _with_choices(Traced(graphs, example, {}), sources, settings, example)


def prepare_without_data(sources: Sources, settings: MergeSettings) -> Traced:
    """Trace and prove the sources on noise, in the shape of an input that is guessed from their first layers.

    Args:
        sources: the source networks.
        settings: the options of the merge.

    Raises:
        UnknownShapeError: if no guess fits.
    """
    x = Call.of(guess_input(sources.first)).with_noise()
    networks = {task: working_copy(network) for task, network in sources.networks.items()}
    return prepare(sources, settings, networks, x, {})


def find_shorter(traced: Traced, sources: Sources, settings: MergeSettings, ends: Sequence[str]) -> list[Graphs]:
    """Trace the sources with trunks that end earlier. Modules at which no trunk can end are skipped.

    Args:
        traced: the sources with the longest trunk.
        sources: the source networks.
        settings: the options of the merge.
        ends: the last modules of the trunks.
    """
    found = []
    for stop_at in ends:
        with suppress(ZipItError):
            found.append(trace_sources(sources, settings, traced.example, stop_at, traced.graph.barriers))
    return found


def _prove(
    sources: Sources,
    settings: MergeSettings,
    networks: Mapping[str, nn.Module],
    x: Inputs,
    graphs: Graphs,
    stop_at: str | None,
) -> Graphs:
    """Return graphs that fit an input, agree with the networks, and are proved on the input unless ``verify=False``."""
    again = partial(trace_sources, sources, settings, x, stop_at)
    views = {task: view_of(x, task) for task in networks}
    if not graphs or not all(graph.captured.is_of(views[task]) for task, graph in graphs.items() if graph.captured):
        try:
            graphs = again()
        except ZipItError as error:
            if not isinstance(x, Call) or settings.start_at is None:
                raise
            raise type(error)(f"{error} {explain_views(networks)}") from error
    return settle(networks, graphs, views, again, settings.verify, settings.merge_heads)


def _find_cuts(
    sources: Sources,
    settings: MergeSettings,
    networks: Mapping[str, nn.Module],
    x: Inputs,
    own: Graphs,
) -> dict[str | None, Graphs]:
    """Trace every cut that the statistics must serve; return an empty dict if they serve only one merge."""
    cuts = {settings.last_module: own} if settings.also else {}
    for stop_at in dict.fromkeys(other.last_module for other in settings.also):
        if stop_at not in cuts:
            with suppress(ZipItError):  # the merge with this cut reports the error
                cuts[stop_at] = _prove(sources, settings, networks, x, {}, stop_at)
    return cuts


def _with_choices(traced: Traced, sources: Sources, settings: MergeSettings, x: Inputs) -> Traced:
    """Find the allowed widths of each feature space, and check that a budget of FLOPs can be met."""
    own = view_of(like(x, sources.first), sources.tasks[0])
    network, models = working_copy(sources.first), len(sources.models)
    choices, notes = find_choices(traced.graph, network, own, settings.width, models)
    counts = _flop_counts(traced.graphs, sources, settings, traced.example)
    traced = replace(traced, choices=choices, notes=notes, flop_counts=counts)
    if settings.flops is not None:
        flops = traced.flops_model(traced.graphs)
        least = flops({name: widths[0] for name, widths in choices.items()}) / flops.source
        if settings.flops < least:
            raise ConfigurationError(
                f"flops={settings.flops} cannot be met: the smallest merged network of these sources has {least:.2f} "
                "times the FLOPs of one source. Raise `flops`, or end the trunk at another module with `stop_at`."
            )
    return traced


def _flop_counts(graphs: Graphs, sources: Sources, settings: MergeSettings, example: Inputs) -> tuple[FlopCounts, ...]:
    if settings.flops is None:
        return ()
    x = each_view(like(example, sources.first), lambda view: view.first(1))
    return tuple(count_flops(network, graphs[task], view_of(x, task)) for task, network in sources.networks.items())
