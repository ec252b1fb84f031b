"""From labels or dense maps to merged weights: one generic loop over the table of axes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_zipit import functional as F
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph import AxisRef, FeatureSpace, MergeGraph
from lightning_zipit.graph.spaces import unit_members, units_around, units_first
from lightning_zipit.matchers import AnyWidthMatcher, DenseMaps, GreedyZip, Matcher, SimilarityKind
from lightning_zipit.statistics import Moments

SCALE_HANDICAP = 1e-6
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class SpaceMap:
    """The matching of one space, from which its merge and unmerge matrices follow.

    They are applied as sums over indices rather than as matrices: each source feature has one label.

    Attributes:
        labels: int64 ``(N·C,)``, the merged feature that each source feature becomes.
        num_models: N.
        weights: how much each model counts in its clusters; all the same by default, and in clusters of models that
            count nothing.
    """

    labels: Tensor
    num_models: int
    weights: tuple[float, ...] | None = None

    @property
    def width(self) -> int:
        """How many features the merged network has."""
        return int(self.labels.max()) + 1

    def targets(self, source: int) -> Tensor:
        """The merged feature of each feature of one source model, ``(C,)``: U_i as indices."""
        return self.labels.chunk(self.num_models)[source]

    def shares(self, source: int) -> Tensor:
        """What each feature of one source model contributes to its cluster, ``(C,)``: the entries of M_i."""
        return F.merge_shares(self.labels, self.num_models, self.weights).chunk(self.num_models)[source]

    def merge(self, source: int, rows: Tensor) -> Tensor:
        """M_i times rows ``(C, …)``: ``(W, …)``."""
        shares = self.shares(source).to(rows).reshape(-1, *[1] * (rows.ndim - 1))
        return self.read(source, rows * shares)

    def read(self, source: int, rows: Tensor) -> Tensor:
        """U_iᵀ times rows ``(C, …)``: ``(W, …)``, the weights by which a layer reads the merged features."""
        summed = rows.new_zeros(self.width, *rows.shape[1:])
        return summed.index_add_(0, self.targets(source).to(rows.device), rows)


@dataclass(frozen=True)
class DenseMap:
    """The merge and unmerge matrices of one space whose merged features are combinations; see :class:`SpaceMap`.

    Attributes:
        matrices: M_i ``(W, C)`` and U_i ``(C, W)`` of each model, float64.
        weights: how much each model counts; all the same by default. M_i is multiplied by N times the model's share.
    """

    matrices: DenseMaps
    weights: tuple[float, ...] | None = None

    @property
    def num_models(self) -> int:
        return len(self.matrices.merge)

    @property
    def width(self) -> int:
        """How many features the merged network has."""
        return len(self.matrices.merge[0])

    def merging(self, source: int) -> Tensor:
        """M_i ``(W, C)``, with the model's weight."""
        matrix = self.matrices.merge[source]
        if self.weights is None:
            return matrix
        return matrix * (self.num_models * model_shares(self.num_models, self.weights)[source])

    def merge(self, source: int, rows: Tensor) -> Tensor:
        """M_i times rows ``(C, …)``: ``(W, …)``."""
        return torch.tensordot(self.merging(source).to(rows), rows, 1)

    def read(self, source: int, rows: Tensor) -> Tensor:
        """U_iᵀ times rows ``(C, …)``: ``(W, …)``, the weights by which a layer reads the merged features."""
        return torch.tensordot(self.matrices.unmerge[source].T.to(rows), rows, 1)


Maps: TypeAlias = Mapping[str, SpaceMap | DenseMap]
"""The matching of each space."""


def families(graph: MergeGraph) -> list[list[str]]:
    """The spaces that must be matched together: groups or heads with all that they hold, every other one by itself."""
    together: dict[str, list[str]] = {}
    for name in units_first(graph):
        together.setdefault([name, *units_around(graph, name)][-1], []).append(name)
    return list(together.values())


def match(
    graph: MergeGraph,
    family: Sequence[str],
    similarity_of: Callable[[str], Tensor | None],
    matcher: Matcher,
    num_models: int,
    widths: Mapping[str, int] | None = None,
    dense: Collection[str] = (),
) -> Iterator[tuple[str, SpaceMap | DenseMap, Tensor | None]]:
    """Match the features of one family of spaces.

    Args:
        graph: the merge graph.
        family: one of :func:`families`.
        similarity_of: from a space to the similarity of its features, ``(N·C, N·C)``; ``None`` where there is none.
        matcher: similarity → labels or dense maps.
        num_models: N.
        widths: of spaces without units, how many features are to be left; those of one model by default.
        dense: spaces to which dense maps can be applied. Others that the matcher has them for are matched one to one,
            or zipped where they are to have another width.

    Yields:
        Per space its name, its map (one without a similarity is matched by number; groups and heads come first, then
        features within those that have become one), and its similarity.
    """
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
            if isinstance(found, DenseMaps) and name in dense:
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


def contract(weight: Tensor, axes: Sequence[AxisRef | None], maps: Maps, source: int) -> Tensor:
    """M_i W_i U_i over the axes of one source model's parameter (ZipIt!, equation 5).

    Args:
        weight: the parameter.
        axes: per axis, the spaces that it writes or reads; ``None`` leaves the axis alone.
        maps: the matching of each space.
        source: the number i of the source model.

    Returns:
        float64, of the shape of ``weight`` but for axes of spaces that are resized.
    """
    weight = weight.detach().cpu().double()
    known = [(axis, ref) for axis, ref in enumerate(axes) if ref is not None]
    for axis, ref in sorted(known, key=lambda item: item[1].groups == 1):  # groups are rows of the source's order
        weight = along_axis(weight, axis, ref, maps, source)
    return weight


def along_axis(weight: Tensor, axis: int, ref: AxisRef, maps: Maps, source: int, elsewhere: float = 1.0) -> Tensor:
    """M_i along one axis of a source model's tensor where it writes its spaces, else U_iᵀ.

    Args:
        weight: a parameter, or features.
        axis: the axis.
        ref: what it holds.
        maps: the matching of each space.
        source: the number i of the source model.
        elsewhere: what entries that hold no feature are multiplied with, on an axis that writes.

    Returns:
        Of the shape of ``weight`` but for the axis, and of its type and device.
    """
    if any(isinstance(maps[space], DenseMap) for space in ref.spaces):
        return _mix_axis(weight, axis, ref, maps, source, elsewhere)
    if ref.role == "producer":
        shares = shares_along(ref, maps, source, elsewhere)
        weight = weight * ref.along(shares.to(weight.dtype), weight, axis)
    return ref.scatter_add(weight, axis, targets_along(ref, maps, source), merged_axis(ref, maps))


def _mix_axis(weight: Tensor, axis: int, ref: AxisRef, maps: Maps, source: int, elsewhere: float) -> Tensor:
    """The same, block by block: the maps of some are dense."""
    rows, merged = weight.movedim(axis, 0), merged_axis(ref, maps)
    mixed = rows.new_zeros(merged.size, *rows.shape[1:])
    outside = torch.ones(ref.size, dtype=torch.bool)
    for block, new in zip(ref.blocks, merged.blocks, strict=True):
        entries, space_map = block.entries(), maps[block.space]
        outside[entries] = False
        apply = space_map.merge if ref.role == "producer" else space_map.read
        mixed[new.entries().to(rows.device)] = apply(source, rows[entries.to(rows.device)])
    places = ref.index({block.space: torch.zeros(block.size, dtype=torch.int64) for block in ref.blocks}, merged)
    share = elsewhere if ref.role == "producer" else 1.0
    mixed[places[outside].to(rows.device)] = rows[outside.to(rows.device)] * share
    return mixed.movedim(0, axis)


def targets_along(ref: AxisRef, maps: Maps, source: int) -> dict[str, Tensor]:
    """U_i of the spaces along an axis, as indices."""
    return {space: found.targets(source) for space in ref.spaces if isinstance(found := maps[space], SpaceMap)}


def unmerge_along(ref: AxisRef, maps: Maps, source: int) -> Tensor:
    """U_i over a whole axis of one source model: from its entries to the merged ones.

    Returns:
        int64 ``(size,)``, the merged entry that stands for each; or float64 ``(size, merged size)``, where some map is
        dense.
    """
    if all(isinstance(maps[space], SpaceMap) for space in ref.spaces):
        return ref.index(targets_along(ref, maps, source), merged_axis(ref, maps))
    return along_axis(torch.eye(ref.size, dtype=torch.float64), 1, replace(ref, role="consumer"), maps, source)


def merged_axis(ref: AxisRef, maps: Maps) -> AxisRef:
    """What an axis of a source model is in the merged network."""
    return ref.resized({space: maps[space].width for space in ref.spaces})


def shares_along(ref: AxisRef, maps: Maps, source: int, elsewhere: float = 1.0) -> Tensor:
    """What each entry of an axis of one source model contributes to the merged entry: M_i, as a vector.

    Args:
        ref: what the axis holds.
        maps: the matching of each space.
        source: the number i of the source model.
        elsewhere: of entries that hold no feature.

    Returns:
        float64 ``(size,)``.
    """
    shares = torch.full((ref.size,), elsewhere, dtype=torch.float64)
    for block in ref.blocks:
        space_map = maps[block.space]
        assert isinstance(space_map, SpaceMap)
        shares[block.entries()] = space_map.shares(source)[:, None]
    return shares


def merge_parameter(
    copies: Sequence[Tensor],
    axes: Sequence[AxisRef | None],
    maps: Maps,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Merge one parameter of N source models: Σ_i M_i W_i U_i over its axes (ZipIt!, equation 5).

    A parameter that writes no space is averaged; whole numbers and equal copies are taken over.

    Args:
        copies: the parameter in each source model, all of one shape.
        axes: per axis, the spaces that it writes or reads; ``None`` leaves the axis alone.
        maps: the matching of each space.
        weights: how much each model counts in a parameter that writes no space; all the same by default.

    Returns:
        The merged parameter, of the type of the first copy, on the CPU.
    """
    first = copies[0].detach()
    untouched = not any(axes)
    if not first.is_floating_point() or (untouched and all(torch.equal(first.cpu(), copy.cpu()) for copy in copies)):
        return first.cpu().clone()
    parts = torch.stack([contract(copy, axes, maps, source) for source, copy in enumerate(copies)])
    if not any(ref is not None and ref.role == "producer" for ref in axes):
        parts *= model_shares(len(copies), weights).reshape(-1, *[1] * first.ndim)
    return parts.sum(0).to(first.dtype)


def model_shares(num_models: int, weights: Sequence[float] | None = None) -> Tensor:
    """What each model contributes where there are no features, float64 ``(N,)``."""
    return F.merge_shares(torch.zeros(num_models, dtype=torch.int64), num_models, weights)


def merge_into(
    target: nn.Module,
    sources: Sequence[nn.Module],
    axes: Mapping[str, tuple[AxisRef | None, ...]],
    maps: Maps,
    weights: Sequence[float] | None = None,
) -> None:
    """Write the merged parameters and buffers into a trunk.

    Args:
        target: a module with parameters under the names that they have in the sources, of the sizes of the merged
            network.
        sources: the source networks.
        axes: the table of axes.
        maps: the matching of each space.
        weights: how much each network counts in parameters that write no space; all the same by default.
    """
    with torch.no_grad():
        for name, tensor in _tensors(target):
            copies = [attrgetter(name)(source) for source in sources]
            tensor.copy_(merge_parameter(copies, axes.get(name, (None,) * tensor.ndim), maps, weights))


def unmerge_into(
    target: nn.Module,
    network: nn.Module,
    axes: Mapping[str, tuple[AxisRef | None, ...]],
    maps: Maps,
    source: int,
) -> None:
    """Let the first layers of one head read the merged features: W_i U_i.

    Args:
        target: the head of one source model, with parameters under the names that they have there, of the sizes of the
            merged network.
        network: that model.
        axes: the table of axes.
        maps: the matching of each space.
        source: the number i of the source model.
    """
    with torch.no_grad():
        for name, tensor in _tensors(target):
            refs = axes.get(name, ())
            if any(refs):
                tensor.copy_(contract(attrgetter(name)(network), refs, maps, source))


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
