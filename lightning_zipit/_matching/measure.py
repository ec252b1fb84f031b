"""Measurements of a space's matching: clusters, similarity, losses, dead features."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_zipit import functional as F
from lightning_zipit._calibration.statistics import Moments
from lightning_zipit._matching.maps import FeatureMap
from lightning_zipit.graph import FeatureSpace


@dataclass(frozen=True)
class SpaceReport:
    """Measurements of the matching of one feature space.

    Attributes:
        name: the first module that writes the space.
        tap: the module in front of which the space was measured, "the cut", or "" if it was matched by index.
        size: the number of features of one model.
        width: the number of merged features.
        within: the number of clusters with two or more features, all of one model.
        across: the number of clusters with features of several models.
        similarity: mean similarity of all pairs of features in the same cluster, at most 1. NaN if there is no such
            pair, or if the space was not measured. If merged features are linear combinations, it is the mean
            similarity of the contributions of two models to the same merged feature.
        lowest: the lowest similarity of such a pair.
        chance: the expected mean similarity if each model's features were assigned to the clusters at random.
        deviation: the standard deviation of this mean over random assignments.
        losses: per model, the ratio of its features' variance that is lost when the mean of the cluster replaces every
            feature; see :func:`~lightning_zipit.functional.zip_losses`.
        samples: the number of samples of the similarity: images, times positions if there are any.
        dead: per model, the number of features that are constant on the calibration data.
    """

    name: str
    tap: str
    size: int
    width: int
    within: int
    across: int
    similarity: float
    lowest: float = math.nan
    chance: float = math.nan
    deviation: float = math.nan
    losses: tuple[float, ...] = ()
    samples: int = 0
    dead: tuple[int, ...] = ()

    @property
    def alone(self) -> int:
        """The number of clusters with one feature."""
        return self.width - self.within - self.across


class Sampled(NamedTuple):
    """Number of samples and of dead features of a space; see :class:`SpaceReport`."""

    samples: int = 0
    dead: tuple[int, ...] = ()

    @classmethod
    def of(cls, moments: Moments, num_models: int) -> Sampled:
        """Count samples and dead features in the moments of N models, side by side."""
        constant = (moments.covariance.diagonal() == 0).view(num_models, -1).sum(1)
        return cls(moments.count, tuple(constant.tolist()))


def measure_space(
    space: FeatureSpace, space_map: FeatureMap, similarity: Tensor | None, sampled: Sampled | None = None
) -> SpaceReport:
    """Measure the matching of a space.

    Args:
        space: the space.
        space_map: its map.
        similarity: ``(N·C, N·C)``, or ``None`` if the space was not measured. For dense maps, the covariance.
        sampled: the number of samples and of dead features.
    """
    sampled = sampled or Sampled()
    within, across = _count_clusters(space_map)
    tap = space.tap.reader if space.tap else ""
    found = SpaceReport(space.name, tap, space.size, space_map.width, within, across, math.nan)
    found = replace(found, samples=sampled.samples, dead=sampled.dead)
    if similarity is None:
        return found
    if space_map.labels is None:
        matched, losses = F.mixed_similarity(similarity, *space_map.matrices)
    else:
        similarity = F.correlation(similarity.cpu())  # only changes a covariance
        matched = similarity[(space_map.labels[:, None] == space_map.labels).fill_diagonal_(False)]
        losses = F.zip_losses(similarity, space_map.labels, space_map.num_models)
        chance, deviation = F.by_chance(similarity, space_map.labels, space_map.num_models)
        found = replace(found, chance=chance, deviation=deviation)
    if len(matched):
        found = replace(found, similarity=float(matched.mean()), lowest=float(matched.min()))
    return replace(found, losses=tuple(losses.tolist()))


def _count_clusters(space_map: FeatureMap) -> tuple[int, int]:
    """Count the clusters within one model and across models. Linear combinations count as across models."""
    if space_map.labels is None:
        return 0, space_map.width
    model = torch.arange(space_map.num_models).repeat_interleave(len(space_map.labels) // space_map.num_models)
    members = torch.zeros(space_map.num_models, space_map.width)  # features of each model in each cluster
    members.index_put_((model, space_map.labels), torch.ones(len(model)), accumulate=True)
    models = (members > 0).sum(0)
    return int(((models == 1) & (members.sum(0) > 1)).sum()), int((models > 1).sum())


def loss_of(space_map: FeatureMap, similarity: Tensor | None, measured: SpaceReport) -> float:
    """Compute the loss of a matching, to compare widths; see :func:`~lightning_zipit.functional.zip_loss`."""
    if space_map.labels is None:
        return sum(measured.losses) / len(measured.losses)
    return 0.0 if similarity is None else F.zip_loss(similarity, space_map.labels)
