"""Goes through the layers of a merged network in order, and adapts each to what the sources compute there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, fx, nn

from lightning_zipit._calibration.calibration import Beginning, choose_positions, marks
from lightning_zipit._common.collectives import all_reduce_sums, exchange, rank_and_size
from lightning_zipit._common.views import Inputs, any_view, view_of
from lightning_zipit._merging.maps import DenseMap, Maps, along_axis, model_shares
from lightning_zipit.graph import AxisRef, MergeGraph
from lightning_zipit.graph.joined import UNMERGE, Joined
from lightning_zipit.graph.layers import TOO_MANY_INPUTS, Fitted, Layer, Norm, find_stops, groups_of, layer_of
from lightning_zipit.refine.finite import MERGED, check_values, source_of
from lightning_zipit.refine.frontier import Frontier, Run, Values
from lightning_zipit.refine.least_squares import MOST_INPUTS, NormalEquations, patches, samples, solve_layer
from lightning_zipit.refine.moments import FeatureMoments
from lightning_zipit.refine.outputs import Outputs, outputs_shape
from lightning_zipit.refine.repair import rescale_layer
from lightning_zipit.refine.settings import LayerByLayer, LeastSquares


@dataclass(frozen=True)
class Zip:
    """How the features of the sources along an axis become those of the merged network: M.

    Attributes:
        shares: of each source, what it contributes where there are no spaces, ``(N,)``.
        ref: what the outputs of a layer hold; ``None`` for those of a head, which has one source and its features.
        maps: the matching of each space.
    """

    shares: Tensor
    ref: AxisRef | None = None
    maps: Maps = field(default_factory=dict)

    @property
    def mixes(self) -> bool:
        """Whether merged features are combinations of all."""
        return self.ref is not None and any(isinstance(self.maps[space], DenseMap) for space in self.ref.spaces)

    def part(self, source: int, value: Tensor) -> Tensor:
        """M_i z_i ``(samples, W)``, of the values of one source ``(samples, C)``."""
        share = float(self.shares[source])
        if self.ref is None:
            return value * share
        return along_axis(value, 1, self.ref, self.maps, source, elsewhere=share)

    def __call__(self, values: Sequence[Tensor]) -> Tensor:
        """M·[z_1 … z_N], ``(samples, W)``, of the values of all sources."""
        return sum((self.part(source, value) for source, value in enumerate(values[1:], 1)), self.part(0, values[0]))


class Walk:
    """Adapts a merged network, layer by layer, on the calibration data of all processes.

    Args:
        trunk: the merged trunk; it is changed.
        heads: the heads by task; they are changed.
        sources: the source networks by task, in eval mode.
        graphs: their merge graphs.
        maps: the matching of each space.
        batches: inputs, those of this process, on the device of the networks.
        how: what to do with each layer.
        weights: how much each model counts; all the same by default.
        models: the number of the model that each source is a part of, where several are paths of a merged one.
        stems: per task, from its input to what the trunk takes; the trunk then goes through every batch once for each
            task, and is fitted to all of them.

    Attributes:
        left: what keeps the weights that merging gave it, by names as those that :meth:`run` returns, and what it has
            that stands in the way.
    """

    def __init__(
        self,
        trunk: nn.Module,
        heads: Mapping[str, nn.Module],
        sources: Mapping[str, nn.Module],
        graphs: Mapping[str, MergeGraph],
        maps: Maps,
        batches: Sequence[Inputs],
        how: LayerByLayer,
        weights: Sequence[float] | None = None,
        models: Mapping[str, int] | None = None,
        stems: Mapping[str, nn.Module] | None = None,
    ) -> None:
        models = models or {task: number for number, task in enumerate(sources)}
        self._numbers = sorted(set(models.values()))  # of the models
        leads = [list(models.values()).index(number) for number in self._numbers]
        self.models, self.shares = models, model_shares(len(leads), weights)
        self.heads, self.sources, self.graphs, self.maps, self.how = heads, sources, graphs, maps, how
        self.batches = batches
        self.left: dict[str, str] = {}
        self.marks = [marks(any_view(x)) for x in batches]
        self.graph = next(iter(graphs.values()))
        self.nodes = list(self.graph.trunk_graph())
        crossing = {crossing.node for crossing in self.graph.crossings}
        self.crossings = [node for node in self.nodes if node.name in crossing]
        self.leads = [list(sources)[lead] for lead in leads]
        self.stems = stems or {}
        # The tasks on whose inputs the merged trunk runs: one stands for all where they have the same.
        separate = self.stems or any(isinstance(batch, Mapping) for batch in batches)
        self.paths = list(sources) if separate else self.leads[:1]
        by_name = {node.name: node for node in self.graph.fx_graph.nodes}
        self.entries = [by_name[entry.node] for entry in self.graph.entries]
        own = [sources[task] for task in self.leads]
        self.runs = [Run(network, self.nodes, self.crossings) for network in (*[trunk] * len(self.paths), *own)]
        self.head_nodes = {
            task: [node for node in graph.head_graph() if node.op != "output"] for task, graph in graphs.items()
        }

    def run(self) -> dict[str, float]:
        """Go through the trunk, then through every head.

        Returns:
            For :class:`LeastSquares`, the share of the variance of its target that each layer explains; layers are
            named ``trunk.`` or ``heads.TASK.`` and what they are called in the backbone.

        Raises:
            CalibrationError: if a network computes NaN or Inf.
        """
        if isinstance(self.how, LeastSquares):  # what merging gave counts as one image more
            images = sum(exchange(lambda: sum(map(len, self.marks))))
            self.how = replace(self.how, ridge=self.how.ridge + 1 / images)
        fits: dict[str, float] = {}
        found = {"trunk": find_stops(self.graph, self.runs[0].network, self.nodes, self.entries)}
        for task, nodes in self.head_nodes.items():
            graph = self.graphs[task]
            before = [*graph.stem_graph(), *graph.trunk_graph()]
            found[f"heads.{task}"] = find_stops(graph, self.heads[task], nodes, before)
        silent = rank_and_size()[0] != 0 or not Console().is_terminal
        with Progress(transient=True, disable=silent) as progress:
            bar = progress.add_task("refining layers", total=sum(len(stops) for stops, _ in found.values()))
            for part, (stops, left) in found.items():
                walked = self._start(part)
                for name, fit in walked.visit(stops):
                    progress.advance(bar)
                    if fit is not None:
                        fits[f"{part}.{name}"] = fit
                self.left |= {f"{part}.{name}": why for name, why in (left | walked.left).items()}
                if part == "trunk":
                    self.trunk.complete()
        return fits

    def _start(self, part: str) -> _Part:
        limit = int(self.how.cache_bytes)
        if part == "trunk":
            self.trunk = Frontier(self.runs, len(self.batches), self._begin, limit)

            def zip_of(name: str) -> Zip:
                return Zip(self.shares, self.graph.axes.get(f"{name}.weight", (None,))[0], self.maps)

            sources = [[task for task, model in self.models.items() if model == number] for number in self._numbers]
            return _Part(part, self.trunk, zip_of, self.how, self.marks, sources, len(self.paths))
        task = part.partition(".")[2]
        if not self.head_nodes[task]:
            return _Part(part, Frontier([], 0, self._begin, limit), lambda _: Zip(torch.ones(1)), self.how, [], [])
        runs = [Run(network, self.head_nodes[task]) for network in (self.heads[task], self.sources[task])]
        frontier = Frontier(runs, len(self.batches), lambda batch: self._begin_head(task, batch), limit)
        return _Part(part, frontier, lambda _: Zip(torch.ones(1)), self.how, self.marks, [[task]])

    def _begin(self, batch: int) -> list[Values]:
        """What the merged trunk starts from for each path, and each source."""
        x = self.batches[batch]
        if self.stems:
            merged = [self.stems[task](view_of(x, task)) for task in self.paths]
            own = [Beginning(self.graphs[task], self.sources[task]).run(view_of(x, task)) for task in self.leads]
            return [dict(zip(self.entries, values, strict=False)) for values in (*merged, *own)]
        inputs = next(node for node in self.nodes if node.op == "placeholder")
        return [{inputs: view_of(x, task).clone()} for task in (*self.paths, *self.leads)]

    def _begin_head(self, task: str, batch: int) -> list[Values]:
        """What the trunk hands over: the merged one to the head, the source's own to the rest of the source."""
        path = self.paths.index(task) if task in self.paths else 0
        merged, own = self.trunk.finish(batch, (path, len(self.paths) + self.models[task]))
        graph = self.graphs[task]
        by_name = {node.name: node for node in graph.fx_graph.nodes}
        values: list[Values] = [{by_name[node.name]: held[node] for node in self.crossings} for held in (merged, own)]
        for crossing in graph.crossings:
            if crossing.ref is not None and not crossing.absorbed:
                node = by_name[crossing.node]
                for held, part in zip(values, (self.heads[task], self.sources[task]), strict=True):
                    if part is self.heads[task] or isinstance(part, Joined):
                        held[node] = part.get_submodule(f"{UNMERGE}.{crossing.node}")(held[node])
        passed = [by_name[crossing.node] for crossing in graph.crossings if crossing.node in graph.stem_nodes]
        if passed:
            beside = self.stems[task](view_of(self.batches[batch], task))[len(self.entries) :]
            for held in values:
                held |= {node: _cloned(value) for node, value in zip(passed, beside, strict=True)}
        return values


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class _Part:
    """The trunk or a head on its way: takes it, and its sources, from stop to stop."""

    def __init__(
        self,
        name: str,
        frontier: Frontier,
        zip_of: Callable[[str], Zip],
        how: LayerByLayer,
        marks: Sequence[Tensor],
        sources: Sequence[list[str]],
        paths: int = 1,
    ) -> None:
        self.name, self.frontier, self.zip_of, self.how = name, frontier, zip_of, how
        self.marks = marks  # of the samples of each batch
        self.sources = [source_of(tasks) for tasks in sources]
        self.left: dict[str, str] = {}  # the layers that were left, and why
        self.paths = paths  # how often the merged network runs; the sources come behind
        if frontier.runs:
            self.merged = frontier.runs[0].network
            self.position = {node: number for number, node in enumerate(frontier.runs[0].nodes)}
        self.sources_at = 0

    def visit(self, stops: Sequence[Layer | Norm]) -> Iterator[tuple[str, float | None]]:
        for stop in stops:
            if isinstance(stop, Norm):
                self._renew(stop)
                yield stop.name, None
            elif isinstance(self.how, LeastSquares):
                yield stop.name, self._solve(stop, self.how)
            else:
                self._rescale(stop)
                yield stop.name, None

    def _batches(
        self, stop: Layer | Norm, target: fx.Node | None = None
    ) -> Iterator[tuple[Tensor, list[Values], list[Values]]]:
        """Per batch its marks, the values of the merged network before a stop, and of the sources behind a target."""
        if target is not None:
            self.sources_at = max(self.sources_at, self.position[target] + 1)
        sources = len(self.frontier.runs) - self.paths
        ends = [self.position[stop.node]] * self.paths + [self.sources_at] * sources
        for numbers, values in zip(self.marks, self.frontier.visit(ends), strict=True):
            yield numbers + self.position[stop.node], values[: self.paths], values[self.paths :]

    def _positions(self, layer: Fitted, value: Tensor, marks: Tensor) -> Tensor | None:
        """Positions of every sample that depend on the sample and the layer alone, so that all processes agree."""
        count = value[0].numel() // (value.shape[-1] if isinstance(layer, nn.Linear) else value.shape[1])
        if self.how.positions is None or count <= self.how.positions:
            return None
        each, rest = divmod(len(value), len(marks))  # windows are samples
        own = marks.repeat_interleave(each) if not rest else marks.new_zeros(len(value))
        return choose_positions(own, count, self.how.positions)

    def _solve(self, stop: Layer, how: LeastSquares) -> float | None:
        layer, norm = layer_of(self.merged, stop)
        inputs, outputs, groups = layer.weight[0].numel(), len(layer.weight), groups_of(layer)
        if inputs > MOST_INPUTS:
            self.left[stop.name] = TOO_MANY_INPUTS
            return None
        zipped, outcome = self.zip_of(stop.name), Outputs(stop, self.merged)
        of_sources = [Outputs(stop, run.network) for run in self.frontier.runs[self.paths :]]
        equations = NormalEquations(groups, inputs, outputs // groups, layer.weight.device)
        watched = equations.count.new_zeros(len(self.sources), 1)
        for numbers, merged, sources in self._batches(stop, stop.target):
            like = outputs_shape(layer, merged[0][stop.input])
            wanted = [own(each[stop.target], like) for own, each in zip(of_sources, sources, strict=True)]
            chosen = self._positions(layer, wanted[0], numbers)
            rows = [samples(layer, each, chosen) for each in wanted]
            watched += torch.stack([each.sum(dtype=torch.float64)[None] for each in rows])
            zipped_rows = zipped(rows)
            for values in merged:
                target = zipped_rows
                if stop.beside is not None:
                    target = target - samples(layer, outcome(values[stop.beside], like), chosen)
                x = patches(layer, values[stop.input], chosen)
                equations.add(x, target.unflatten(1, (groups, -1)).movedim(1, 0))
        all_reduce_sums([*equations.sums, watched])
        self._check(stop, equations.totals, watched)
        return solve_layer(layer, norm, equations.centred(), how.ridge, outcome.scale())

    def _rescale(self, stop: Layer) -> None:
        layer, norm = layer_of(self.merged, stop)
        size, device = len(layer.weight), layer.weight.device
        zipped, now = self.zip_of(stop.name), FeatureMoments(size, device)
        at = stop.norm or stop.node
        widths = [len(layer_of(run.network, stop)[0].weight) for run in self.frontier.runs[self.paths :]]
        wanted = [FeatureMoments(size if zipped.mixes else width, device) for width in widths]
        for numbers, merged, sources in self._batches(stop, at):
            chosen = self._positions(layer, sources[0][at], numbers)
            for values in merged:
                now.add(samples(layer, layer(values[stop.input]), chosen))
            rows = [samples(layer, each[at], chosen) for each in sources]
            if zipped.mixes:
                rows = [zipped.part(source, each) for source, each in enumerate(rows)]
            for moments, each in zip(wanted, rows, strict=True):
                moments.add(each)
        all_reduce_sums([moments.sums for moments in (now, *wanted)])
        self._check(stop, now.sums, [moments.sums for moments in wanted])
        means, deviations = [each.mean[None] for each in wanted], [each.variance.sqrt()[None] for each in wanted]
        if zipped.mixes:
            mean, std = (torch.stack(moments).sum(0)[0] for moments in (means, deviations))
        else:
            mean, std = zipped(means)[0], zipped(deviations)[0]
        rescale_layer(layer, norm, now, mean, std)

    def _renew(self, stop: Norm) -> None:
        """Statistics of what reaches a norm that stands by itself."""
        norm = self.merged.get_submodule(stop.name)
        mean = norm.get_buffer("running_mean")
        now = FeatureMoments(len(mean), mean.device)
        for _, merged, _ in self._batches(stop):
            for values in merged:
                now.add(values[stop.input].movedim(1, -1).flatten(0, -2))
        all_reduce_sums([now.sums])
        self._check(stop, now.sums)
        mean.copy_(now.mean)
        norm.get_buffer("running_var").copy_(now.variance)

    def _check(self, stop: Layer | Norm, merged: Tensor, sources: Iterable[Tensor] = ()) -> None:
        """Look for NaN and Inf in sums over what the merged network, and the sources, compute at a stop."""
        check_values(f"{self.name}.{stop.name}", {MERGED: merged, **dict(zip(self.sources, sources, strict=False))})
