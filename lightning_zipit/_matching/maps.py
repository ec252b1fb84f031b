"""What the features of a space become in the merged network, and how that is applied to the axes of tensors."""

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
    """Merge and unmerge matrices of one space: what a matcher may return instead of labels.

    Attributes:
        merge: M_i ``(W, C)`` of each model. The merged features are Σ_i M_i x_i if all models count the same.
        unmerge: U_i ``(C, W)`` of each model. U_i times the merged features stands for the features of model i.
    """

    merge: Sequence[Tensor]
    unmerge: Sequence[Tensor]


class FeatureMap(ABC):
    """What the features of one space become: M_i and U_i of every model.

    Attributes:
        num_models: N.
        weights: how much each model counts in the merged features; ``None`` if all count the same.
        labels: int64 ``(N·C,)``, the merged feature that each source feature becomes; ``None`` if merged features are
            linear combinations.
        matrices: the merge and unmerge matrices, for models that count the same.
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
        """Whether merged features are linear combinations, so that there are no labels."""
        return self.labels is None

    @abstractmethod
    def merge(self, source: int, rows: Tensor) -> Tensor:
        """M_i times rows ``(C, …)``: ``(W, …)``."""

    @abstractmethod
    def read(self, source: int, rows: Tensor) -> Tensor:
        """U_iᵀ times rows ``(C, …)``: ``(W, …)``, the weights by which a layer reads the merged features."""

    @abstractmethod
    def merging(self, source: int) -> Tensor:
        """M_i ``(W, C)`` with the weight of the model."""

    def targets(self, source: int) -> Tensor | None:
        """The merged feature of each feature of one model ``(C,)``: U_i as indices; ``None`` if the map mixes."""
        return None if self.labels is None else self.labels.chunk(self.num_models)[source]

    @abstractmethod
    def with_weights(self, weights: Sequence[float] | None) -> FeatureMap:
        """The same map for models that count as given."""

    def counting_alone(self, source: int) -> FeatureMap:
        """The same map if only one model counts: M_i for the parts of the network that belong to one task."""
        return self.with_weights([float(number == source) for number in range(self.num_models)])


@dataclass(frozen=True)
class SpaceMap(FeatureMap):
    """A map by labels: each source feature becomes one merged feature.

    M_i and U_i are applied as sums over indices instead of as matrices.

    Attributes:
        labels: int64 ``(N·C,)``, the merged feature that each source feature becomes.
        num_models: N.
        weights: how much each model counts in its clusters; ``None`` if all count the same. In a cluster in which no
            model counts, all count the same.
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
        """What each feature of one model contributes to its cluster ``(C,)``: the entries of M_i."""
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
        weights: how much each model counts; ``None`` if all count the same. M_i is multiplied by N times the share of
            the model.
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


def counting_alone(maps: Maps, source: int) -> dict[str, FeatureMap]:
    """The maps if only one model counts; see :meth:`FeatureMap.counting_alone`."""
    return {space: known.counting_alone(source) for space, known in maps.items()}


def mixes(ref: AxisRef, maps: Maps) -> bool:
    """Whether the map of some space along an axis is made of matrices."""
    return any(maps[space].mixes for space in ref.spaces)


def along_axis(weight: Tensor, axis: int, ref: AxisRef, maps: Maps, source: int, elsewhere: float = 1.0) -> Tensor:
    """Apply M_i along an axis of a source tensor that writes its spaces, or U_iᵀ along one that reads them.

    Args:
        weight: a parameter, or features.
        axis: the axis.
        ref: what it holds.
        maps: the map of each space.
        source: the number i of the source model.
        elsewhere: factor of the entries that hold no feature, on an axis that writes.

    Returns:
        Of the shape of ``weight`` but for the axis, and of its type and device.
    """
    if mixes(ref, maps):
        return _mix_axis(weight, axis, ref, maps, source, elsewhere)
    if ref.role == "producer":
        shares = shares_along(ref, maps, source, elsewhere)
        weight = weight * ref.along(shares.to(weight.dtype), weight, axis)
    return ref.scatter_add(weight, axis, _targets_along(ref, maps, source), merged_axis(ref, maps))


def _mix_axis(weight: Tensor, axis: int, ref: AxisRef, maps: Maps, source: int, elsewhere: float) -> Tensor:
    """:func:`along_axis` block by block, for axes with a map that mixes."""
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
    """M_i W_i U_i over the axes of a parameter of one source model (ZipIt!, section 4).

    Args:
        weight: the parameter.
        axes: per axis, the spaces that it writes or reads; ``None`` leaves the axis as it is.
        maps: the map of each space.
        source: the number i of the source model.

    Returns:
        float64, of the shape of ``weight`` but for axes of spaces that are resized.
    """
    weight = weight.detach().cpu().double()
    known = [(axis, ref) for axis, ref in enumerate(axes) if ref is not None]
    for axis, ref in sorted(known, key=lambda item: item[1].groups == 1):  # groups are rows of the source's order
        weight = along_axis(weight, axis, ref, maps, source)
    return weight


def _targets_along(ref: AxisRef, maps: Maps, source: int) -> dict[str, Tensor]:
    """U_i of the spaces along an axis, as indices, for maps by labels."""
    found = {space: maps[space].targets(source) for space in ref.spaces}
    return {space: targets for space, targets in found.items() if targets is not None}


def unmerge_along(ref: AxisRef, maps: Maps, source: int) -> Tensor:
    """U_i over a whole axis of one source model: from its entries to the merged ones.

    Returns:
        int64 ``(size,)``, the merged entry that stands for each; or float64 ``(size, merged size)`` if a map mixes.
    """
    if mixes(ref, maps):
        return along_axis(torch.eye(ref.size, dtype=torch.float64), 1, replace(ref, role="consumer"), maps, source)
    return ref.index(_targets_along(ref, maps, source), merged_axis(ref, maps))


def merged_axis(ref: AxisRef, maps: Maps) -> AxisRef:
    """The axis of the merged network that an axis of a source model becomes."""
    return ref.resized({space: maps[space].width for space in ref.spaces})


def shares_along(ref: AxisRef, maps: Maps, source: int, elsewhere: float = 1.0) -> Tensor:
    """What each entry of an axis of one source model contributes to its merged entry: M_i as a vector.

    Args:
        ref: what the axis holds.
        maps: the map of each space, by labels.
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


def model_shares(num_models: int, weights: Sequence[float] | None = None) -> Tensor:
    """What each model contributes to parameters that hold no features, float64 ``(N,)``."""
    return F.merge_shares(torch.zeros(num_models, dtype=torch.int64), num_models, weights)
