"""What the features of a space become in the merged network, and how that is applied to the axes of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_zipit import functional as F
from lightning_zipit.graph import AxisRef
from lightning_zipit.matchers import DenseMaps


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


def counting_alone(maps: Maps, source: int) -> dict[str, SpaceMap | DenseMap]:
    """The matching of each space, where one source model alone counts: M_i for a task's own part of the network."""
    return {
        space: replace(known, weights=tuple(float(number == source) for number in range(known.num_models)))
        for space, known in maps.items()
    }


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


def model_shares(num_models: int, weights: Sequence[float] | None = None) -> Tensor:
    """What each model contributes where there are no features, float64 ``(N,)``."""
    return F.merge_shares(torch.zeros(num_models, dtype=torch.int64), num_models, weights)
