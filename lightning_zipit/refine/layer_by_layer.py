"""Layer-by-layer refinements: adapt the layers of a merged network in order."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import fx

from lightning_zipit._calibration.lockstep import run_of_stem, run_stem
from lightning_zipit._calibration.positions import marks
from lightning_zipit._common.collectives import exchange, rank_and_size
from lightning_zipit._common.views import Inputs, any_view, view_of
from lightning_zipit._matching.maps import model_shares
from lightning_zipit.graph import MergeGraph
from lightning_zipit.graph.joined import UNMERGE, Joined
from lightning_zipit.graph.layers import Fitted, Layer, Norm, Stops, find_stops, layer_of
from lightning_zipit.graph.part import name_of_added
from lightning_zipit.graph.run import Run, Values, cloned, enter_inputs
from lightning_zipit.refine.finite import source_of
from lightning_zipit.refine.frontier import Frontier
from lightning_zipit.refine.part import Part
from lightning_zipit.refine.refinement import Changes, MergedNetworks, Refinement, Refining
from lightning_zipit.refine.zip import Zip


@dataclass(frozen=True)
class LayerByLayer(Refinement):
    """Base class of refinements that adapt the layers of trunk and heads one by one, in the order of the network.

    A subclass implements :meth:`adapt`. A batch norm that does not follow an adapted layer gets the statistics of its
    input.

    Args:
        positions: the number of random positions of each image or sequence that are used for a layer; ``None`` for
            all.
        cache_bytes: memory for the activations of all batches between two layers. If the activations need more, they
            are recomputed for each layer, from the last layer whose activations did fit.

    Raises:
        ValueError: if ``positions`` is below 1, or ``cache_bytes`` is negative.
    """

    positions: int | None = 64
    cache_bytes: float = 4 * 2**30

    def __post_init__(self) -> None:
        if self.positions is not None and self.positions < 1:
            raise ValueError(f"`positions` must be at least 1, or None for all positions, got {self.positions}.")
        if self.cache_bytes < 0:
            raise ValueError(f"`cache_bytes` must not be negative, got {self.cache_bytes}.")

    def start(self, merged: MergedNetworks) -> Refining:
        return _Collecting(merged, self)

    @abstractmethod
    def adapt(self, part: Part, stop: Layer) -> float | None:
        """Change the weights of one layer of the merged network.

        Args:
            part: the trunk or head, with the inputs of the layer.
            stop: the layer.

        Returns:
            The ratio of its target's variance that the layer explains, for the report; ``None`` if unknown.
        """

    def obstacle(self, layer: Fitted) -> str:
        """Return why a layer keeps its merged weights, or an empty string if it is adapted."""
        return ""


class _Collecting(Refining):
    """Store all batches, and adapt the layers after the last batch."""

    def __init__(self, merged: MergedNetworks, how: LayerByLayer) -> None:
        super().__init__(merged)
        self.how = how
        self.batches: list[Inputs] = []

    def add(self, inputs: Inputs, tasks: Iterable[str]) -> None:
        self.batches.append(inputs)

    def finish(self) -> Changes:
        with torch.autocast(self.merged.device.type, enabled=False):
            return Walk(self.merged, self.how, self.batches).run()


class _Planned(NamedTuple):
    """A part of the merged network, its layers, and a function that creates the :class:`Part`.

    The function returns ``None`` for a part without nodes.
    """

    name: str
    found: Stops
    start: Callable[[], Part | None]


class Walk:
    """Adapt merged networks layer by layer, on the calibration data of all processes.

    With stems, or with a separate input for each task, the merged trunk runs on every batch once per task.

    Args:
        merged: the merged networks, which are changed in place, and their sources.
        how: the refinement that adapts each layer.
        batches: the input batches of this process.
    """

    def __init__(self, merged: MergedNetworks, how: LayerByLayer, batches: Sequence[Inputs]) -> None:
        self.merged, self.how, self.batches = merged, how, batches
        self.marks = [marks(any_view(x)) for x in batches]
        self.images = sum(exchange(lambda: sum(map(len, self.marks))))
        self.graph = next(iter(merged.graphs.values()))
        nodes, by_name = list(self.graph.trunk_graph()), {node.name: node for node in self.graph.fx_graph.nodes}
        self.crossings = [node for node in nodes if node.name in {crossing.node for crossing in self.graph.crossings}]
        self.entries = [by_name[entry.node] for entry in self.graph.entries]
        tasks = list(merged.sources)
        self.of_models = [
            [task for task in tasks if merged.models[task] == model] for model in sorted(set(merged.models.values()))
        ]
        self.leads = [of_model[0] for of_model in self.of_models]
        # The tasks on whose inputs the merged trunk runs. If all tasks have the same input, one task is enough.
        separate = merged.stems or any(isinstance(batch, Mapping) for batch in batches)
        self.paths = tasks if separate else self.leads[:1]
        own = [merged.sources[task] for task in self.leads]
        kept = [*self.crossings, *(node for node in nodes if set(nodes).isdisjoint(node.users))]
        runs = [Run(network, self.graph.fx_graph, nodes, kept) for network in (*[merged.trunk] * len(self.paths), *own)]
        self.trunk = Frontier(runs, len(batches), self._begin_trunk, int(how.cache_bytes))

    def run(self) -> Changes:
        """Adapt the trunk, then every head.

        Returns:
            The fit of each layer for which the refinement returns it, and a note on the layers that were not adapted.

        Raises:
            CalibrationError: if a network computes NaN or Inf.
        """
        planned = [self._plan_trunk(), *map(self._plan_head, self.merged.heads)]
        fits: dict[str, float] = {}
        left: dict[str, str] = {}
        with progress_over(sum(len(found.stops) for _, found, _ in planned)) as advance:
            for name, found, start in planned:
                left |= {f"{name}.{layer}": why for layer, why in found.left.items()}
                part = start()
                for stop in found.stops if part is not None else ():
                    assert part is not None
                    fit, why = self._visit(part, stop)
                    if fit is not None:
                        fits[f"{name}.{stop.name}"] = fit
                    if why:
                        left[f"{name}.{stop.name}"] = why
                    advance()
                if name == "trunk":
                    self.trunk.complete()
        return Changes(fits=fits, notes=note_of(left))

    def _visit(self, part: Part, stop: Layer | Norm) -> tuple[float | None, str]:
        """Adapt a layer or norm, and return its fit, or the reason why it was not adapted."""
        if isinstance(stop, Norm):
            part.renew(stop)
            return None, ""
        if why := self.how.obstacle(layer_of(part.merged, stop)[0]):
            return None, why
        return self.how.adapt(part, stop), ""

    def _plan_trunk(self) -> _Planned:
        run = self.trunk.runs[0]

        def zip_of(name: str) -> Zip:
            shares = model_shares(len(self.leads), self.merged.weights)
            return Zip(shares, self.graph.axes.get(f"{name}.weight", (None,))[0], self.merged.maps)

        def start() -> Part:
            return self._part("trunk", self.trunk, zip_of, self.of_models, len(self.paths))

        return _Planned("trunk", find_stops(self.graph, run.network, run.nodes, self.entries), start)

    def _plan_head(self, task: str) -> _Planned:
        graph, head, name = self.merged.graphs[task], self.merged.heads[task], f"heads.{task}"
        nodes = [node for node in graph.head_graph() if node.op != "output"]

        def start() -> Part | None:
            if not nodes:
                return None
            runs = [Run(network, graph.fx_graph, nodes) for network in (head, self.merged.sources[task])]
            limit = int(self.how.cache_bytes)
            frontier = Frontier(runs, len(self.batches), lambda batch: self._begin_head(task, batch), limit)
            return self._part(name, frontier, lambda _: Zip(torch.ones(1)), [[task]])

        return _Planned(name, find_stops(graph, head, nodes, [*graph.stem_graph(), *graph.trunk_graph()]), start)

    def _part(
        self,
        name: str,
        frontier: Frontier,
        zip_of: Callable[[str], Zip],
        sources: Sequence[list[str]],
        paths: int = 1,
    ) -> Part:
        named = [source_of(tasks) for tasks in sources]
        return Part(name, frontier, zip_of, self.marks, named, self.how.positions, self.images, paths)

    def _begin_trunk(self, batch: int) -> list[Values]:
        """Compute the start values of the merged trunk for each path, followed by those of each source."""
        x, stems = self.batches[batch], self.merged.stems
        if not stems:
            nodes = self.trunk.runs[0].nodes
            return [enter_inputs(nodes, view_of(x, task).copies) for task in (*self.paths, *self.leads)]
        merged = [stems[task](*view_of(x, task).copies) for task in self.paths]
        own = [run_stem(self._stem_of(task), view_of(x, task)) for task in self.leads]
        return [dict(zip(self.entries, values, strict=False)) for values in (*merged, *own)]

    def _stem_of(self, task: str) -> Run:
        return run_of_stem(self.merged.graphs[task], self.merged.sources[task])

    def _begin_head(self, task: str, batch: int) -> list[Values]:
        """Compute the start values of a head: from the merged trunk, and from the head's source."""
        path = self.paths.index(task) if task in self.paths else 0
        merged, own = self.trunk.finish(batch, (path, len(self.paths) + self.merged.models[task]))
        graph = self.merged.graphs[task]
        by_name = {node.name: node for node in graph.fx_graph.nodes}
        values: list[Values] = [{by_name[node.name]: known[node] for node in self.crossings} for known in (merged, own)]
        head, source = self.merged.heads[task], self.merged.sources[task]
        unmerge = name_of_added(graph.module, UNMERGE)
        for crossing in graph.crossings:
            if crossing.ref is not None and not crossing.absorbed:
                node = by_name[crossing.node]
                for known, network in zip(values, (head, source), strict=True):
                    if network is head or isinstance(network, Joined):
                        known[node] = network.get_submodule(f"{unmerge}.{crossing.node}")(known[node])
        self._add_bypassing(graph, task, batch, values)
        return values

    def _add_bypassing(self, graph: MergeGraph, task: str, batch: int, values: Sequence[Values]) -> None:
        """Add the values that the stem of a task passes directly to its head."""
        by_name = {node.name: node for node in graph.fx_graph.nodes}
        passed: list[fx.Node] = [
            by_name[crossing.node] for crossing in graph.crossings if crossing.node in graph.stem_nodes
        ]
        if passed:
            stem = self.merged.stems[task]
            made = stem(*view_of(self.batches[batch], task).copies)[len(self.entries) :]
            for known in values:
                known |= {node: cloned(value) for node, value in zip(passed, made, strict=True)}


@contextmanager
def progress_over(total: int) -> Iterator[Callable[[], None]]:
    """Context manager: show a progress bar on the terminal of rank 0. Call the yielded function once per layer."""
    silent = rank_and_size()[0] != 0 or not Console().is_terminal
    with Progress(transient=True, disable=silent) as progress:
        bar = progress.add_task("refining layers", total=total)
        yield lambda: progress.advance(bar)


def note_of(left: Mapping[str, str]) -> tuple[str, ...]:
    """Write a note on the layers that keep their merged weights, with reasons; empty if there are no such layers."""
    named: dict[str, list[str]] = {}
    for name, why in left.items():
        named.setdefault(why, []).append(f"`{name}`")
    listed = "; ".join(f"{', '.join(names)} ({why})" for why, names in named.items())
    return (f"The refinement skipped these layers: {listed}.",) * bool(listed)
