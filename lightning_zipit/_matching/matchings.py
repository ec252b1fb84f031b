"""Matching phase: match all spaces from their statistics, distributed over the processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor, nn

from lightning_zipit._calibration.calibration import Calibration
from lightning_zipit._common.collectives import exchange, rank_and_size
from lightning_zipit._matching.answers import maps_from
from lightning_zipit._matching.families import Match, families
from lightning_zipit._matching.maps import FeatureMap
from lightning_zipit._matching.matcher import Matcher
from lightning_zipit._matching.measure import Sampled, SpaceReport, loss_of, measure_space
from lightning_zipit._matching.similarity import SimilarityKind, similarity_from
from lightning_zipit._matching.spaces import Spaces
from lightning_zipit.graph import MergeGraph
from lightning_zipit.graph.rigid import find_rigid

Choices = Mapping[str, Sequence[int]]
"""The allowed widths of each space."""


@dataclass(frozen=True)
class Matched:
    """A matching of one space.

    Attributes:
        space_map: the map.
        report: the measurements of the matching.
        loss: the loss of the matching, to compare widths; see :func:`~lightning_zipit.functional.zip_loss`.
    """

    space_map: FeatureMap
    report: SpaceReport
    loss: float = 0.0


class Matchings:
    """Match the spaces of N models, each space for each of its allowed widths.

    Args:
        matcher: the matcher.
        similarity: the kind of similarity for the matcher.
        num_models: N.

    Attributes:
        found: per space, its matchings in the order of its widths. All processes hold the same matchings.
    """

    def __init__(self, matcher: Matcher, similarity: SimilarityKind, num_models: int) -> None:
        self.matcher, self.similarity, self.num_models = matcher, similarity, num_models
        self.found: dict[str, list[Matched]] = {}
        self._sampled: dict[str, Sampled] = {}
        self._similarities: dict[str, Tensor] = {}  # only for a joint matcher

    def add(self, graph: MergeGraph, turn: Sequence[Sequence[str]], calibration: Calibration, choices: Choices) -> None:
        """Match some families of spaces. Each process matches a part of them.

        The statistics of these spaces are removed from ``calibration``. For a joint matcher, the similarities are
        stored until :meth:`finish`.

        Args:
            graph: the merge graph of the first model.
            turn: some of :func:`~lightning_zipit._matching.families.families`.
            calibration: the statistics of all processes.
            choices: per space its widths, in ascending order.
        """

        def similarity_of(space: str) -> Tensor | None:
            moments = calibration.take(space)
            if moments is None:
                return None
            self._sampled[space] = Sampled.of(moments, self.num_models)
            return similarity_from(moments, self.similarity)

        if self.matcher.joint:
            for name in (name for family in turn for name in family):
                if (similarity := similarity_of(name)) is not None:
                    self._similarities[name] = similarity.cpu()
            return
        networks = list(calibration.networks.values())
        spaces = Spaces(graph, networks, turn, {}, similarity_of, cache(lambda: find_rigid(graph)))
        for part in exchange(lambda: self._match_part(spaces, choices)):
            self.found.update(part)

    def finish(self, graph: MergeGraph, networks: Sequence[nn.Module], choices: Choices) -> None:
        """Match all spaces together, if the matcher is joint."""
        if self.matcher.joint:
            widths = {name: chosen for name, (chosen,) in choices.items()}
            every = families(graph)
            rigid_of = cache(lambda: find_rigid(graph))
            spaces = Spaces(graph, networks, every, widths, self._similarities.get, rigid_of)
            matched = self._match(spaces)
            self._similarities.clear()
            self.found = {name: [matched[name]] for name in graph.spaces}

    def _match_part(self, spaces: Spaces, choices: Choices) -> dict[str, list[Matched]]:
        """Match the families assigned to this process, with each of their widths."""
        rank, processes = rank_and_size()
        costs = [sum(spaces[name].size ** 2 for name in family) for family in spaces.families]
        matched: dict[str, list[Matched]] = {}
        for index in split_evenly(costs, processes)[rank]:
            family, once = spaces.families[index], cache(spaces.similarity_of)
            for widths in _widths_of(family, choices):
                found = self._match(replace(spaces, families=[family], widths=widths, similarity_of=once))
                for name, one in found.items():
                    matched.setdefault(name, []).append(one)
        return matched

    def _match(self, spaces: Spaces) -> dict[str, Matched]:
        """Call the matcher for some spaces, and measure the matchings."""
        answers = self.matcher.match(spaces)
        maps = maps_from(answers, spaces, self.matcher)
        return {name: self._measured(spaces, name, space_map, answers[name]) for name, space_map in maps.items()}

    def _measured(self, spaces: Spaces, name: str, space_map: FeatureMap, match: Match) -> Matched:
        report = measure_space(spaces[name], space_map, match.similarity, self._sampled.get(name))
        return Matched(space_map, report, loss_of(space_map, match.similarity, report))


def _widths_of(family: Sequence[str], choices: Choices) -> list[dict[str, int]]:
    """List the widths with which to match a family. A family of several spaces keeps its size."""
    if len(family) > 1:
        return [{}]
    return [{name: width} for name in family for width in choices[name]]


def split_evenly(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Split pieces of work into parts of similar cost (greedy: largest piece first, to the part with the lowest load).

    Args:
        costs: the cost of each piece.
        parts: the number of parts.

    Returns:
        Per part, the indices of its pieces.
    """
    chosen: list[list[int]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        part = loads.index(min(loads))
        chosen[part].append(piece)
        loads[part] += costs[piece]
    return chosen
