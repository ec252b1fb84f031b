"""Families: spaces that are matched together, such as attention heads and the features inside them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_zipit import functional as F
from lightning_zipit._calibration.calibration import statistics_bytes
from lightning_zipit._matching.maps import DenseMaps
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph import FeatureSpace, MergeGraph
from lightning_zipit.graph.spaces import handed_over, unit_members, units_around, units_first


class Match(NamedTuple):
    """The matching of one space.

    Attributes:
        features: int64 labels ``(N·C,)``, the merged feature of each source feature; or dense maps.
        similarity: ``(N·C, N·C)``, the similarity with which the report rates the matching. If it is ``None``, the
            report has no similarity for the space.
    """

    features: Tensor | DenseMaps
    similarity: Tensor | None = None


class Rule(Protocol):
    """Protocol of a matcher for one space. Every matcher implements it."""

    @property
    def any_width(self) -> bool:
        """Whether :meth:`match_space` accepts any number of merged features."""

    def match_space(self, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor | DenseMaps:
        """Compute labels ``(N·C,)`` or dense maps from a similarity ``(N·C, N·C)``."""


def families(graph: MergeGraph) -> list[list[str]]:
    """Group the spaces that must be matched together. Groups or heads come before the features inside them."""
    together: dict[str, list[str]] = {}
    for name in units_first(graph):
        together.setdefault([name, *units_around(graph, name)][-1], []).append(name)
    return list(together.values())


def split_families(graph: MergeGraph, num_models: int, limit: float) -> list[list[list[str]]]:
    """Split families into turns, so that the statistics of one turn fit into a memory limit.

    Args:
        graph: the merge graph.
        num_models: N.
        limit: the memory limit in bytes. A turn with a single family may exceed it.

    Returns:
        The families of each turn.
    """
    turns: list[list[list[str]]] = []
    filled = 0
    for family in families(graph):
        size = sum(statistics_bytes(graph, name, num_models) for name in family)
        if not turns or filled + size > limit:
            turns.append([])
            filled = 0
        turns[-1].append(family)
        filled += size
    return turns


def match_family(
    graph: MergeGraph,
    family: Sequence[str],
    similarities: Mapping[str, Tensor],
    rule: Rule,
    num_models: int,
    widths: Mapping[str, int] | None = None,
    rigid_of: Callable[[], Collection[str]] = tuple,
) -> dict[str, Match]:
    """Match one family of spaces with a matcher for one space.

    A space without a similarity is matched by index. Groups and heads are matched first, by the similarity of their
    features. Features are then matched within each merged group or head.

    Spaces that stems write are matched one to one if the matcher accepts any width or returns dense maps. A stem has
    only the features of its own model, so a cluster without them would always be zero for its task.

    Args:
        graph: the merge graph.
        family: one of :func:`families`.
        similarities: per space the similarity of its features, ``(N·C, N·C)``.
        rule: the matcher.
        num_models: N.
        widths: the number of merged features of spaces without units; by default the number of features of one model.
        rigid_of: returns the spaces to which dense maps cannot be applied. If the matcher returns dense maps for such
            a space, the space is matched one to one instead, or zipped if its width changes.

    Returns:
        The matching of each space. Groups and heads come first.

    Raises:
        ConfigurationError: if the matcher returns matrices of a wrong shape, or with NaN or Inf.
    """
    handed = handed_over(graph)
    if not handed.isdisjoint(family) and rule.any_width:
        rule = _OneToOne()
    known = _with_units(graph, family, similarities, num_models)
    found: dict[str, Match] = {}
    labels: dict[str, Tensor] = {}
    for name in family:
        space, similarity = graph.spaces[name], known.get(name)
        if space.units is not None:
            labels[name] = _match_within(space, labels[space.units], similarity, rule, num_models)
        elif similarity is None:
            labels[name] = F.average(num_models * space.size, num_models)
        else:
            features = _ask(rule, similarity, num_models, widths.get(name) if widths else None)
            if not isinstance(features, Tensor) and name not in handed and name not in rigid_of():
                found[name] = Match(features, similarity)
                continue
            labels[name] = as_labels(features, similarity, num_models)
        found[name] = Match(labels[name], similarity)
    return found


def _with_units(
    graph: MergeGraph, family: Sequence[str], similarities: Mapping[str, Tensor], num_models: int
) -> dict[str, Tensor]:
    """Add the similarities of groups or heads to those of a family, and drop the spaces matched by index."""
    known = {name: similarity for name, similarity in similarities.items() if not graph.spaces[name].pinned}
    for name in reversed(family):  # members before their units
        members = [graph.spaces[other] for other in family if graph.spaces[other].units == name]
        if members and not graph.spaces[name].pinned:
            known.update(_of_units(graph.spaces[name], members, known, num_models))
    return known


class _OneToOne:
    """Match the features of each model one to one to those of the first model."""

    any_width = False

    def match_space(self, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor:
        return F.permute(similarity, num_models)


def _ask(rule: Rule, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor | DenseMaps:
    """Call a matcher, and return its result on the CPU.

    Raises:
        ConfigurationError: if the matcher returns matrices of a wrong shape, or with NaN or Inf.
    """
    found = rule.match_space(similarity, num_models, width)
    if isinstance(found, Tensor):
        return found.cpu()
    size = len(similarity) // num_models
    return check_matrices(found, size, size if width is None else width, num_models, repr(rule))


def check_matrices(found: DenseMaps, size: int, width: int, num_models: int, who: str) -> DenseMaps:
    """Validate dense maps, and return them in float64 on the CPU.

    Args:
        found: the dense maps.
        size: the number of features of one model C.
        width: the number of merged features W.
        num_models: N.
        who: the name of the matcher, for error messages.

    Raises:
        ConfigurationError: if a matrix has a wrong shape, or holds NaN or Inf.
    """
    made = DenseMaps(*(tuple(matrix.detach().double().cpu() for matrix in each) for each in found))
    shapes = [tuple(matrix.shape) for each in made for matrix in each]
    if shapes != [(width, size)] * num_models + [(size, width)] * num_models:
        raise ConfigurationError(
            f"{who} must return labels, or DenseMaps with {num_models} merge matrices of shape ({width}, {size}) and "
            f"{num_models} unmerge matrices of shape ({size}, {width}), got shapes {shapes}."
        )
    if not all(matrix.isfinite().all() for each in made for matrix in each):
        raise ConfigurationError(f"{who} returned matrices with NaN or Inf.")
    return made


def as_labels(found: Tensor | DenseMaps, similarity: Tensor, num_models: int) -> Tensor:
    """Replace dense maps that cannot be applied by labels: matched one to one, or zipped to the width of the maps."""
    if isinstance(found, Tensor):
        return found
    scaled, width = F.correlation(similarity), len(found.merge[0])
    if width == len(similarity) // num_models:
        return F.permute(scaled, num_models)
    return F.zip_features(scaled, num_models, width)


def _of_units(
    units: FeatureSpace, members: list[FeatureSpace], similarities: Mapping[str, Tensor], num_models: int
) -> dict[str, Tensor]:
    """Similarity of groups or heads: how well the features of two can be matched, over all their spaces."""
    known = [similarities[units.name].double().cpu()] if units.name in similarities else []
    known += [
        F.unit_similarity(similarities[space.name], unit_members(space), num_models)
        for space in members
        if space.name in similarities
    ]
    return {units.name: torch.stack(known).mean(0)} if known else {}


def _match_within(space: FeatureSpace, units: Tensor, similarity: Tensor | None, rule: Rule, num_models: int) -> Tensor:
    """Match features within each merged unit.

    Args:
        space: the space of the features.
        units: the labels of all units, ``(N·G,)``.
        similarity: the similarity of the features; ``None`` to match by index.
        rule: the matcher.
        num_models: N.
    """
    members = unit_members(space)  # (G, d)
    everyone = torch.cat([members + model * space.size for model in range(num_models)])  # (N·G, d)
    labels = torch.empty(num_models * space.size, dtype=torch.int64)
    for unit, merged in enumerate(members):
        together = everyone[units == unit]  # (k, d)
        features = together.flatten()
        if similarity is None or len(together) == 1:
            within = F.average(len(features), len(together))
        else:
            own = similarity[features][:, features]
            within = as_labels(_ask(rule, own, len(together)), own, len(together))
        labels[features] = merged[within]
    return labels
