"""The maps of all spaces with what is known of them, matched as statistics come, by all processes together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor, nn

from lightning_zipit import functional as F
from lightning_zipit._calibration.calibration import Calibration
from lightning_zipit._common.collectives import exchange, rank_and_size
from lightning_zipit._matching.by_weights import match_by_weights
from lightning_zipit._matching.families import match, similarity_from
from lightning_zipit._merging.dense import find_rigid
from lightning_zipit._merging.maps import DenseMap, SpaceMap
from lightning_zipit._report.report import Measure, SpaceReport, report_space
from lightning_zipit.graph import FeatureSpace, MergeGraph
from lightning_zipit.matchers import DualSpace, Matcher, SimilarityKind

Choices = Mapping[str, Sequence[int]]
"""Per space, the widths that it may have."""


@dataclass(frozen=True)
class Matched:
    """A matching of one space.

    Attributes:
        space_map: the labels, or matrices.
        report: for people.
        loss: what is lost by it; see :func:`~lightning_zipit.functional.zip_loss`.
    """

    space_map: SpaceMap | DenseMap
    report: SpaceReport
    loss: float = 0.0

    @classmethod
    def of(
        cls,
        space: FeatureSpace,
        space_map: SpaceMap | DenseMap,
        similarity: Tensor | None,
        measure: Measure | None = None,
    ) -> Matched:
        report = report_space(space, space_map, similarity, measure)
        if isinstance(space_map, DenseMap):
            return cls(space_map, report, sum(report.losses) / len(report.losses))
        return cls(space_map, report, 0.0 if similarity is None else F.zip_loss(similarity, space_map.labels))


class Matchings:
    """Matches the spaces of N models, each for every width that it may have.

    Args:
        matcher: similarity → labels, or dense maps.
        similarity: what the matcher is given.
        num_models: N.

    Attributes:
        found: per space, its matchings in the order of its widths; the same on all processes.
    """

    def __init__(self, matcher: Matcher, similarity: SimilarityKind, num_models: int) -> None:
        self.matcher, self.similarity, self.num_models = matcher, similarity, num_models
        self.found: dict[str, list[Matched]] = {}
        self._measures: dict[str, Measure] = {}
        self._similarities: dict[str, Tensor] = {}  # of all spaces, for a matcher that looks at them together

    def add(
        self, graph: MergeGraph, families: Sequence[Sequence[str]], calibration: Calibration, choices: Choices
    ) -> None:
        """Match some families of spaces from their statistics, which are used up; each process matches a part of them.

        A matcher that looks at all spaces together has their similarities kept for it until :meth:`finish`.

        Args:
            graph: the merge graph of the first model.
            families: of :func:`~lightning_zipit._matching.families.families`.
            calibration: the statistics of all processes.
            choices: per space its widths, in rising order.
        """

        def similarity_of(space: str) -> Tensor | None:
            moments = calibration.take(space)
            if moments is None:
                return None
            self._measures[space] = Measure.of(moments, self.num_models)
            return similarity_from(moments, self.similarity)

        if isinstance(self.matcher, DualSpace):
            for name in (name for family in families for name in family):
                if (similarity := similarity_of(name)) is not None:
                    self._similarities[name] = similarity.cpu()
            return
        for part in exchange(lambda: self._match_share(graph, families, similarity_of, choices)):
            self.found.update(part)

    def finish(self, graph: MergeGraph, networks: Sequence[nn.Module], choices: Choices) -> None:
        """Match what :meth:`add` has kept, by weights too."""
        if isinstance(self.matcher, DualSpace):
            widths = {name: chosen for name, (chosen,) in choices.items()}
            matched = match_by_weights(graph, networks, self._similarities, self.matcher, widths)
            self._similarities.clear()
            self.found = {
                name: [Matched.of(graph.spaces[name], *found, self._measures.get(name))]
                for name, found in matched.items()
            }

    def _match_share(
        self,
        graph: MergeGraph,
        families: Sequence[Sequence[str]],
        similarity_of: Callable[[str], Tensor | None],
        choices: Choices,
    ) -> dict[str, list[Matched]]:
        """Of some families, those that this process is to match."""
        rank, processes = rank_and_size()
        rigid = cache(lambda: find_rigid(graph))
        costs = [sum(graph.spaces[name].size ** 2 for name in family) for family in families]
        matched: dict[str, list[Matched]] = {}
        for number in split_evenly(costs, processes)[rank]:
            family, once = families[number], cache(similarity_of)
            for widths in _widths_of(family, choices):
                found = match(
                    graph, family, once, self.matcher, self.num_models, widths, lambda name: name not in rigid()
                )
                for name, space_map, similarity in found:
                    one = Matched.of(graph.spaces[name], space_map, similarity, self._measures.get(name))
                    matched.setdefault(name, []).append(one)
        return matched


def _widths_of(family: Sequence[str], choices: Choices) -> list[dict[str, int]]:
    """The widths to match a family with, one after the other; a family of several spaces has but one."""
    if len(family) > 1:
        return [{}]
    return [{name: width} for name in family for width in choices[name]]


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
