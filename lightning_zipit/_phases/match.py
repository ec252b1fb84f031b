"""The phase *match*: choose the width of every feature space, and the end of the trunk, within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_zipit._common.sources import Sources
from lightning_zipit._matching.matchings import Matched
from lightning_zipit._merging.widths import BudgetedWidths
from lightning_zipit._phases.calibrate import as_measured
from lightning_zipit._phases.prepare import Graphs, Traced, find_shorter
from lightning_zipit.graph import FeatureSpace, MergeGraph
from lightning_zipit.graph.cut import find_cuts
from lightning_zipit.settings import MergeSettings


@dataclass(frozen=True)
class Matching:
    """The matching of every feature space of a trunk.

    Attributes:
        graphs: the merge graph of each source network, by task. Its trunk may end earlier than the traced trunk.
        spaces: the matching of each feature space, by name.
    """

    graphs: Graphs
    spaces: Mapping[str, Matched]

    @property
    def graph(self) -> MergeGraph:
        """The merge graph of the first network."""
        return next(iter(self.graphs.values()))


def choose(
    found: Mapping[str, Sequence[Matched]], traced: Traced, sources: Sources, settings: MergeSettings
) -> Matching:
    """Choose one matching of every feature space. With a budget, choose the widths with the least loss within it.

    Args:
        found: the matchings of each feature space, one for each allowed width.
        traced: the traced sources.
        sources: the source networks.
        settings: the options of the merge.
    """
    if settings.flops is None:
        return Matching(traced.graphs, {name: one for name, (one,) in found.items()})
    losses = {name: {one.space_map.width: one.loss for one in matched} for name, matched in found.items()}
    ends = [traced.graphs]
    if settings.stop_at == "auto":
        shorter = find_shorter(traced, sources, settings, find_cuts(traced.graph))
        ends += [graphs for graphs in shorter if _is_measured(graphs, traced, settings)]
    plans = []
    for graphs in ends:
        own = {name: losses[name] for name in found if name in next(iter(graphs.values())).spaces}
        plans.append(BudgetedWidths.within(traced.flops_model(graphs), own, settings.flops))
    best = min(range(len(plans)), key=lambda number: plans[number].loss)
    chosen = {
        name: next(one for one in found[name] if one.space_map.width == width)
        for name, width in plans[best].widths.items()
    }
    return Matching(ends[best], chosen)


def _is_measured(graphs: Graphs, traced: Traced, settings: MergeSettings) -> bool:
    """Whether all feature spaces of a shorter trunk were measured at that trunk's own taps."""
    measured = as_measured(traced.graph, settings).spaces
    spaces = as_measured(next(iter(graphs.values())), settings).spaces
    return all(name in measured and _place(measured[name]) == _place(space) for name, space in spaces.items())


def _place(space: FeatureSpace) -> tuple[str | None, int]:
    """Return the tap and the size of a feature space."""
    return None if space.tap is None else space.tap.key, space.size
