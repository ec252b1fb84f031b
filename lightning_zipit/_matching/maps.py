"""Maps from source features to merged features (M_i and U_i), and their application to the axes of tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_zipit import functional as F
from lightning_zipit.graph import AxisRef


class DenseMaps(NamedTuple):
    """Merge and unmerge matrices of one space. A matcher may return them instead of labels.

    Attributes:
        merge: M_i ``(W, C)`` of each model. With equal weights, the merged features are Σ_i M_i x_i.
        unmerge: U_i ``(C, W)`` of each model. U_i times the merged features replaces the features of model i.
    """

    merge: Sequence[Tensor]
    unmerge: Sequence[Tensor]


class FeatureMap(ABC):
    """The merge and unmerge matrices M_i and U_i of every model for one space.

    Attributes:
        num_models: N.
        weights: the weight of each model in the merged features; ``None`` for equal weights.
        labels: int64 ``(N·C,)``, the merged feature of each source feature; ``None`` if merged features are linear
            combinations.
        matrices: the merge and unmerge matrices for equal weights.
    """

    num_models: int
    weights: tuple[float, ...] | None
    labels: Tensor | None
    matrices: DenseMaps

    @property
    @abstractmethod
    def width(self) -> int:
        """The number of merged features W."""

    @property
    def mixes(self) -> bool:
        """Whether merged features are linear combinations. Such a map has no labels."""
        return self.labels is None

    @abstractmethod
    def merge(self, source: int, rows: Tensor) -> Tensor:
        """Multiply rows ``(C, …)`` by M_i, giving ``(W, …)``."""

    @abstractmethod
    def read(self, source: int, rows: Tensor) -> Tensor:
        """Multiply rows ``(C, …)`` by U_iᵀ, giving ``(W, …)``: a layer's input weights for the merged features."""

    @abstractmethod
    def merging(self, source: int) -> Tensor:
        """Return M_i ``(W, C)``, with the weight of the model."""

    def targets(self, source: int) -> Tensor | None:
        """Return U_i as indices ``(C,)``: the merged feature of each feature of a model. ``None`` if the map mixes."""
        return None if self.labels is None else self.labels.chunk(self.num_models)[source]

    @abstractmethod
    def with_weights(self, weights: Sequence[float] | None) -> FeatureMap:
        """Return the map with other weights of the models."""

    def of_one_model(self, source: int) -> FeatureMap:
        """Return the map with weight 1 for one model and 0 for all others: M_i for the parts of one task."""
        return self.with_weights([float(model == source) for model in range(self.num_models)])


@dataclass(frozen=True)
class SpaceMap(FeatureMap):
    """A map by labels: each source feature becomes one merged feature.

    M_i and U_i are applied as sums over indices, not as matrices.

    Attributes:
        labels: int64 ``(N·C,)``, the merged feature of each source feature.
        num_models: N.
        weights: the weight of each model in its clusters; ``None`` for equal weights. A cluster whose models all have
            weight 0 uses equal weights.
    """

    labels: Tensor
    num_models: int
    weights: tuple[float, ...] | None = None

    @property
    def width(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def matrices(self) -> DenseMaps:  # type: ignore[override]
        return DenseMaps(*F.merge_matrices(self.labels, self.num_models))

    def targets(self, source: int) -> Tensor:
        return self.labels.chunk(self.num_models)[source]

    def shares(self, source: int) -> Tensor:
        """Return the contribution of each feature of a model to its cluster, ``(C,)``: the nonzero entries of M_i."""
        return F.merge_shares(self.labels, self.num_models, self.weights).chunk(self.num_models)[source]

    def merging(self, source: int) -> Tensor:
        return F.merge_matrices(self.labels, self.num_models, self.weights)[0][source]

    def merge(self, source: int, rows: Tensor) -> Tensor:
        return self.read(source, rows * self.shares(source).to(rows).reshape(-1, *[1] * (rows.ndim - 1)))

    def read(self, source: int, rows: Tensor) -> Tensor:
        summed = rows.new_zeros(self.width, *rows.shape[1:])
        return summed.index_add_(0, self.targets(source).to(rows.device), rows)

    def with_weights(self, weights: Sequence[float] | None) -> SpaceMap:
        return replace(self, weights=None if weights is None else tuple(weights))


@dataclass(frozen=True)
class DenseMap(FeatureMap):
    """A map by matrices: each merged feature is a linear combination of source features.

    Attributes:
        matrices: M_i ``(W, C)`` and U_i ``(C, W)`` of each model, float64.
        weights: the weight of each model; ``None`` for equal weights. M_i is multiplied by N times the normalised
            weight of model i.
    """

    matrices: DenseMaps
    weights: tuple[float, ...] | None = None

    @property
    def labels(self) -> None:  # type: ignore[override]
        return None

    @property
    def num_models(self) -> int:  # type: ignore[override]
        return len(self.matrices.merge)

    @property
    def width(self) -> int:
        return len(self.matrices.merge[0])

    def merging(self, source: int) -> Tensor:
        matrix = self.matrices.merge[source]
        if self.weights is None:
            return matrix
        return matrix * (self.num_models * model_shares(self.num_models, self.weights)[source])

    def merge(self, source: int, rows: Tensor) -> Tensor:
        return torch.tensordot(self.merging(source).to(rows), rows, 1)

    def read(self, source: int, rows: Tensor) -> Tensor:
        return torch.tensordot(self.matrices.unmerge[source].T.to(rows), rows, 1)

    def with_weights(self, weights: Sequence[float] | None) -> DenseMap:
        return replace(self, weights=None if weights is None else tuple(weights))


Maps: TypeAlias = Mapping[str, FeatureMap]
"""The map of each space."""


def of_one_model(maps: Maps, source: int) -> dict[str, FeatureMap]:
    """Return the maps with weight 1 for one model and 0 for all others; see :meth:`FeatureMap.of_one_model`."""
    return {space: known.of_one_model(source) for space, known in maps.items()}


def mixes(ref: AxisRef, maps: Maps) -> bool:
    """Whether merged features of a space along an axis are linear combinations."""
    return any(maps[space].mixes for space in ref.spaces)


def along_axis(weight: Tensor, axis: int, ref: AxisRef, maps: Maps, source: int, elsewhere: float = 1.0) -> Tensor:
    """Apply M_i along a producer axis of a source tensor, or U_iᵀ along a consumer axis.

    Args:
        weight: a parameter, or features.
        axis: the index of the axis.
        ref: the spaces along the axis.
        maps: the map of each space.
        source: the index i of the source model.
        elsewhere: factor for the entries of a producer axis that hold no feature.

    Returns:
        The mapped tensor, with the dtype and device of ``weight``. Only the size of the axis may differ.
    """
    if mixes(ref, maps):
        return _mix_axis(weight, axis, ref, maps, source, elsewhere)
    if ref.role == "producer":
        shares = shares_along(ref, maps, source, elsewhere)
        weight = weight * ref.along(shares.to(weight.dtype), weight, axis)
    return ref.scatter_add(weight, axis, _targets_along(ref, maps, source), merged_axis(ref, maps))


def _mix_axis(weight: Tensor, axis: int, ref: AxisRef, maps: Maps, source: int, elsewhere: float) -> Tensor:
    """Apply maps to an axis block by block, if one of them mixes; see :func:`along_axis`."""
    rows, merged = weight.movedim(axis, 0), merged_axis(ref, maps)
    mixed = rows.new_zeros(merged.size, *rows.shape[1:])
    outside = torch.ones(ref.size, dtype=torch.bool)
    for block, new in zip(ref.blocks, merged.blocks, strict=True):
        entries, space_map = block.entries(), maps[block.space]
        outside[entries] = False
        apply = space_map.merge if ref.role == "producer" else space_map.read
        mixed[new.entries().to(rows.device)] = apply(source, rows[entries.to(rows.device)])
    places = ref.index({block.space: torch.zeros(block.size, dtype=torch.int64) for block in ref.blocks}, merged)
    factor = elsewhere if ref.role == "producer" else 1.0
    mixed[places[outside].to(rows.device)] = rows[outside.to(rows.device)] * factor
    return mixed.movedim(0, axis)


def apply_maps(weight: Tensor, axes: Sequence[AxisRef | None], maps: Maps, source: int) -> Tensor:
    """Compute M_i W_i U_i over the axes of a parameter of one source model (ZipIt!, section 4).

    Args:
        weight: the parameter.
        axes: per axis, the spaces that it writes or reads; ``None`` leaves the axis unchanged.
        maps: the map of each space.
        source: the index i of the source model.

    Returns:
        float64, with the shape of ``weight`` except for axes of resized spaces.
    """
    weight = weight.detach().cpu().double()
    known = [(axis, ref) for axis, ref in enumerate(axes) if ref is not None]
    # Grouped axes come first: their groups refer to the rows in the source's order.
    for axis, ref in sorted(known, key=lambda item: item[1].groups == 1):
        weight = along_axis(weight, axis, ref, maps, source)
    return weight


def _targets_along(ref: AxisRef, maps: Maps, source: int) -> dict[str, Tensor]:
    """Return U_i as indices for the spaces along an axis, for maps by labels."""
    found = {space: maps[space].targets(source) for space in ref.spaces}
    return {space: targets for space, targets in found.items() if targets is not None}


def unmerge_along(ref: AxisRef, maps: Maps, source: int) -> Tensor:
    """Compute U_i over a whole axis of one source model, from source entries to merged entries.

    Returns:
        int64 ``(size,)``, the merged entry of each source entry; or float64 ``(size, merged size)`` if a map mixes.
    """
    if mixes(ref, maps):
        return along_axis(torch.eye(ref.size, dtype=torch.float64), 1, replace(ref, role="consumer"), maps, source)
    return ref.index(_targets_along(ref, maps, source), merged_axis(ref, maps))


def merged_axis(ref: AxisRef, maps: Maps) -> AxisRef:
    """Return the axis of the merged network that corresponds to an axis of a source model."""
    return ref.resized({space: maps[space].width for space in ref.spaces})


def shares_along(ref: AxisRef, maps: Maps, source: int, elsewhere: float = 1.0) -> Tensor:
    """Compute the contribution of each entry of an axis to its merged entry: M_i as a vector.

    Args:
        ref: the spaces along the axis.
        maps: the map of each space, by labels.
        source: the index i of the source model.
        elsewhere: the contribution of entries that hold no feature.

    Returns:
        float64 ``(size,)``.
    """
    shares = torch.full((ref.size,), elsewhere, dtype=torch.float64)
    for block in ref.blocks:
        space_map = maps[block.space]
        assert isinstance(space_map, SpaceMap)
        shares[block.entries()] = space_map.shares(source)[:, None]
    return shares


def model_shares(num_models: int, weights: Sequence[float] | None = None) -> Tensor:
    """Compute the contribution of each model to parameters without features, float64 ``(N,)``."""
    return F.merge_shares(torch.zeros(num_models, dtype=torch.int64), num_models, weights)
