"""From statistics to similarities, and from those to a map for every space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_zipit import functional as F
from lightning_zipit._calibration.calibration import statistics_bytes
from lightning_zipit._calibration.statistics import Moments
from lightning_zipit._merging.maps import DenseMap, SpaceMap
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph import FeatureSpace, MergeGraph
from lightning_zipit.graph.spaces import handed_over, unit_members, units_around, units_first
from lightning_zipit.matchers import AnyWidthMatcher, DenseMaps, GreedyZip, Matcher, Permute, SimilarityKind

SCALE_HANDICAP = 1e-6
ROWS_AT_ONCE = 1024


def families(graph: MergeGraph) -> list[list[str]]:
    """The spaces that must be matched together: groups or heads with all that they hold, every other one by itself."""
    together: dict[str, list[str]] = {}
    for name in units_first(graph):
        together.setdefault([name, *units_around(graph, name)][-1], []).append(name)
    return list(together.values())


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
    filled = 0
    for family in families(graph):
        size = sum(statistics_bytes(graph, name, num_models) for name in family)
        if not turns or filled + size > limit:
            turns.append([])
            filled = 0
        turns[-1].append(family)
        filled += size
    return turns


def match(
    graph: MergeGraph,
    family: Sequence[str],
    similarity_of: Callable[[str], Tensor | None],
    matcher: Matcher,
    num_models: int,
    widths: Mapping[str, int] | None = None,
    mixable: Callable[[str], bool] = lambda space: False,
) -> Iterator[tuple[str, SpaceMap | DenseMap, Tensor | None]]:
    """Match the features of one family of spaces.

    Those that stems hand over are matched one to one where the matcher is for any width or has dense maps: a stem has
    the features of its own model alone, so that a cluster of another's would be silent for its task.

    Args:
        graph: the merge graph.
        family: one of :func:`families`.
        similarity_of: from a space to the similarity of its features, ``(N·C, N·C)``; ``None`` where there is none.
        matcher: similarity → labels or dense maps.
        num_models: N.
        widths: of spaces without units, how many features are to be left; those of one model by default.
        mixable: whether dense maps can be applied to a space. Others that the matcher has them for are matched one to
            one, or zipped where they are to have another width.

    Yields:
        Per space its name, its map (one without a similarity is matched by number; groups and heads come first, then
        features within those that have become one), and its similarity.
    """
    handed = handed_over(graph)
    if not handed.isdisjoint(family) and isinstance(matcher, AnyWidthMatcher):
        matcher = Permute()
    similarities = {name: known for name in family if (known := similarity_of(name)) is not None}
    for name in reversed(family):  # members before their units
        members = [graph.spaces[other] for other in family if graph.spaces[other].units == name]
        if members and not graph.spaces[name].pinned:
            similarities.update(_of_units(graph.spaces[name], members, similarities, num_models))
    labels: dict[str, Tensor] = {}
    for name in family:
        space = graph.spaces[name]
        if space.units is not None:
            labels[name] = _match_within(space, labels[space.units], similarities.get(name), matcher, num_models)
        elif name in similarities:
            found = _ask(matcher, similarities[name], num_models, widths.get(name) if widths else None)
            if isinstance(found, DenseMaps) and mixable(name) and name not in handed:
                yield name, DenseMap(found), similarities[name]
                continue
            labels[name] = _as_labels(found, similarities[name], num_models)
        else:
            labels[name] = F.average(num_models * space.size, num_models)
        yield name, SpaceMap(labels[name], num_models), similarities.get(name)


def _ask(matcher: Matcher, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor | DenseMaps:
    """What a matcher says, on the CPU.

    Raises:
        ConfigurationError: if it returns matrices that do not fit.
    """
    if isinstance(matcher, AnyWidthMatcher) and width is not None:
        found = matcher(similarity, num_models, width)
    else:
        found = matcher(similarity, num_models)
    if isinstance(found, Tensor):
        return found.cpu()
    size = len(similarity) // num_models
    width = size if width is None else width
    made = DenseMaps(*(tuple(matrix.detach().double().cpu() for matrix in each) for each in found))
    shapes = [tuple(matrix.shape) for each in made for matrix in each]
    if shapes != [(width, size)] * num_models + [(size, width)] * num_models:
        raise ConfigurationError(
            f"{matcher!r} must return labels, or DenseMaps of {num_models} matrices ({width}, {size}) and as many "
            f"({size}, {width}), got shapes {shapes}."
        )
    if not all(matrix.isfinite().all() for each in made for matrix in each):
        raise ConfigurationError(f"{matcher!r} returned matrices with NaN or Inf.")
    return made


def _as_labels(found: Tensor | DenseMaps, similarity: Tensor, num_models: int) -> Tensor:
    """Labels, where dense maps do not apply."""
    if isinstance(found, Tensor):
        return found
    scaled, width = F.correlation(similarity), len(found.merge[0])
    if width == len(similarity) // num_models:
        return F.permute(scaled, num_models)
    return GreedyZip()(scaled, num_models, width)


def similarity_from(moments: Moments, kind: SimilarityKind = "correlation") -> Tensor:
    """How alike features are, lowered by up to a millionth where two differ in scale.

    Features that are active on the same few samples are perfectly correlated; only their scales tell them apart.

    Args:
        moments: of the features, models side by side.
        kind: ``"correlation"``, ``"absolute"`` (its absolute value), ``"cosine"`` (of activations that are not
            centred), or ``"covariance"``.

    Returns:
        float64 ``(N·C, N·C)``.
    """
    if kind == "covariance":
        return moments.covariance
    scale = moments.covariance.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    if kind == "cosine":
        share = (moments.count - 1) / moments.count
        similarity = F.correlation(torch.addr(moments.covariance, moments.mean, moments.mean, beta=share))
    else:
        similarity = F.correlation(moments.covariance)
    if kind == "absolute":
        similarity.abs_()
    for rows, own in zip(similarity.split(ROWS_AT_ONCE), scale.split(ROWS_AT_ONCE), strict=True):
        ratio = own[:, None] / scale[None, :]
        ratio = torch.minimum(ratio, ratio.reciprocal())
        rows.mul_(ratio.sub_(1).mul_(SCALE_HANDICAP).add_(1))
    return similarity


def _of_units(
    units: FeatureSpace, members: list[FeatureSpace], similarities: Mapping[str, Tensor], num_models: int
) -> dict[str, Tensor]:
    """The similarity of groups or heads: how well the features of two can be matched, over all their spaces."""
    known = [similarities[units.name].double().cpu()] if units.name in similarities else []
    known += [
        F.unit_similarity(similarities[space.name], unit_members(space), num_models)
        for space in members
        if space.name in similarities
    ]
    return {units.name: torch.stack(known).mean(0)} if known else {}


def _match_within(
    space: FeatureSpace, units: Tensor, similarity: Tensor | None, matcher: Matcher, num_models: int
) -> Tensor:
    """Match the features of the units that have become one; ``units`` are the labels of all units, ``(N·G,)``."""
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
            within = _as_labels(_ask(matcher, own, len(together)), own, len(together))
        labels[features] = merged[within]
    return labels
