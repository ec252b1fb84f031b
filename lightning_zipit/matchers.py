"""Matchers: decide which features are merged, from the similarity of a feature space to labels or matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, get_args

from torch import Tensor

from lightning_zipit import functional as F
from lightning_zipit._matching.by_weights import match_by_weights
from lightning_zipit._matching.families import Match
from lightning_zipit._matching.maps import DenseMaps
from lightning_zipit._matching.matcher import AnyWidthMatcher, Matcher
from lightning_zipit._matching.similarity import SimilarityKind
from lightning_zipit._matching.spaces import Spaces
from lightning_zipit.functional.matching import Linkage

__all__ = [
    "CCA",
    "Agglomerative",
    "AnyWidthMatcher",
    "Average",
    "CycleConsistent",
    "DenseMaps",
    "DualSpace",
    "GreedyZip",
    "KMeans",
    "Match",
    "Matcher",
    "Optimal",
    "Permute",
    "SimilarityKind",
    "Spaces",
    "WeightMatching",
]


@dataclass(frozen=True)
class GreedyZip(AnyWidthMatcher):
    """Zip features across and within models, the most similar pair first (ZipIt!, section 4.1).

    Dead features (constant on the calibration data) are paired first. In a tie, a partner in another model is
    preferred; see :func:`~lightning_zipit.functional.zip_features`.

    Args:
        alpha: factor for the similarity of a merged cluster, 0 to 1; see
            :func:`~lightning_zipit.functional.greedy_zip`.
        beta: the highest ratio of each model's merges that happen within the model, 0 to 1.

    Raises:
        ValueError: if ``alpha`` or ``beta`` is not between 0 and 1.

    Example:
        >>> import torch
        >>> similarity = torch.tensor([[1.0, 0.1, 0.2, 0.9], [0.1, 1.0, 0.8, 0.3], [0.2, 0.8, 1.0, 0.0],
        ...                            [0.9, 0.3, 0.0, 1.0]])
        >>> GreedyZip(alpha=0.1, beta=1.0)(similarity, num_models=2)
        tensor([0, 1, 1, 0])
    """

    alpha: float = 0.1
    beta: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {getattr(self, name)}.")

    def __call__(self, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor:
        return F.zip_features(similarity, num_models, width, self.alpha, self.beta)


@dataclass(frozen=True)
class Permute(Matcher):
    """Match every model one to one to the first model, by linear assignment (Git Re-Basin, arXiv 2209.04836)."""

    def __call__(self, similarity: Tensor, num_models: int) -> Tensor:
        return F.permute(similarity, num_models)


@dataclass(frozen=True)
class Optimal(Matcher):
    """Pair the features of two models, within or across models, with the highest total similarity (ZipIt!, appendix).

    Exact and slow: minutes for a space with 256 features per model; see :func:`~lightning_zipit.functional.optimal`.
    """

    def __call__(self, similarity: Tensor, num_models: int) -> Tensor:
        return F.optimal(similarity, num_models)


@dataclass(frozen=True)
class KMeans(AnyWidthMatcher):
    """Cluster the features of all models by k-means (ZipIt!, appendix); see :func:`~lightning_zipit.functional.kmeans`.

    Args:
        seed: random seed for the initial centres.
    """

    seed: int = 0

    def __call__(self, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor:
        return F.kmeans(similarity, num_models, seed=self.seed, width=width)


@dataclass(frozen=True)
class Average(Matcher):
    """Match features by index: plain weight averaging."""

    by_index = True

    def __call__(self, similarity: Tensor, num_models: int) -> Tensor:
        return F.average(len(similarity), num_models)


@dataclass(frozen=True)
class Agglomerative(AnyWidthMatcher):
    """Cluster features bottom-up (agglomerative clustering); see :func:`~lightning_zipit.functional.agglomerative`.

    Args:
        linkage: the similarity of two clusters: the ``"average"`` over pairs of their members, the least similar pair
            (``"complete"``), or the most similar pair (``"single"``).

    Raises:
        ValueError: if ``linkage`` has another value.
    """

    linkage: Linkage = "average"

    def __post_init__(self) -> None:
        if self.linkage not in get_args(Linkage):
            raise ValueError(f"`linkage` must be one of {get_args(Linkage)}, got {self.linkage!r}.")

    def __call__(self, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor:
        return F.agglomerative(similarity, num_models, self.linkage, width)


@dataclass(frozen=True)
class CycleConsistent(Matcher):
    """Match three or more models one to one, each model to all others at once (C²M³, arXiv 2405.17897).

    ``Permute`` matches every model to the first model. Its result depends on which model is first, and ignores the
    similarity between the other models. For two models, both matchers give the same result.
    """

    def __call__(self, similarity: Tensor, num_models: int) -> Tensor:
        return F.cycle_consistent(similarity, num_models)


@dataclass(frozen=True)
class CCA(Matcher):
    """Align models by linear maps instead of one-to-one matching (CCA Merge, arXiv 2407.05385).

    A linear map T_i transforms the features of model i into the features of the first model. It is computed by
    canonical correlation analysis of the activations. Weights are then averaged: M_i = T_i / N and U_i = T_i⁻¹. For
    two models this is the method of the paper, with ``gamma`` relative to the variance of the features. With three or
    more models, each model is aligned with all others, not only with the first; see
    :func:`~lightning_zipit.functional.align`. The features of the first model are the common coordinates, because
    activation functions act on single features. For a copy of the first model, T is the identity.

    A batch norm directly after a layer is folded into the layer, mapped with it, and then set up again. The paper maps
    scale, shift and statistics of a batch norm like features. Spaces to which dense maps cannot be applied are matched
    like by :class:`Permute`. The report lists these spaces with the reason.

    Args:
        gamma: ridge on the diagonal of each model's covariance, as a ratio to the mean variance. A higher ridge gives
            less weight to directions with low variance.

    Raises:
        ValueError: if ``gamma`` is not above 0.

    Example:
        >>> import torch
        >>> covariance = torch.tensor([[4.0, 0.0, 0.0, 2.0], [0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0],
        ...                            [2.0, 0.0, 0.0, 1.0]])
        >>> CCA(gamma=1e-9)(covariance, num_models=2).unmerge[1].round(decimals=4)
        tensor([[0.0000, 1.0000],
                [0.5000, 0.0000]], dtype=torch.float64)
    """

    gamma: float = 1.0
    similarity: ClassVar[SimilarityKind | None] = "covariance"
    dense = True

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"`gamma` must be above 0, got {self.gamma}.")

    def __call__(self, similarity: Tensor, num_models: int) -> DenseMaps:
        onto, back = F.align(similarity, num_models, self.gamma)
        return DenseMaps(tuple(matrix / num_models for matrix in onto), tuple(back))


@dataclass(frozen=True)
class DualSpace(Matcher):
    """Match by weights and activations together (MuDSC, arXiv 2403.01753).

    The similarity of a space is τ·(cosine of weights) + (1 - τ)·(similarity of activations). The cosine of weights
    depends on the matching of the neighbouring spaces, so all spaces are matched in turn until no label changes.

    Args:
        tau: weight of the similarity of weights, 0 to 1.
        matcher: the matcher that turns a similarity into labels.
        rounds: the highest number of rounds over all spaces.
        seed: random seed for the order of the spaces.

    Raises:
        ValueError: if ``tau`` is not between 0 and 1, if ``rounds`` is below 1, or if ``matcher`` does not match one
            space at a time by any similarity.
    """

    tau: float = 0.5
    matcher: Matcher = field(default_factory=Permute)
    rounds: int = 20
    seed: int = 0
    joint = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"`tau` must lie between 0 and 1, got {self.tau}.")
        if self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {self.rounds}.")
        if not isinstance(self.matcher, Matcher) or self.matcher.joint:
            raise ValueError(
                "`matcher` must be a Matcher that matches one space at a time, such as Permute(), got "
                f"{self.matcher!r}."
            )
        if self.matcher.similarity is not None:
            raise ValueError(
                f"`matcher` must accept any similarity, but {self.matcher!r} accepts only a {self.matcher.similarity}: "
                "pass this matcher to the merge directly."
            )

    @property
    def any_width(self) -> bool:  # type: ignore[override]
        return self.matcher.any_width

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return self.tau < 1

    @property
    def per_space(self) -> Matcher:
        return self.matcher

    def __call__(self, similarity: Tensor, num_models: int) -> Tensor | DenseMaps:
        return self.matcher(similarity, num_models)

    def match(self, spaces: Spaces) -> Mapping[str, Match]:
        return match_by_weights(spaces, self.matcher, self.tau, self.rounds, self.seed)


@dataclass(frozen=True)
class WeightMatching(DualSpace):
    """Match by weights only, without data (Git Re-Basin, arXiv 2209.04836, algorithm 1).

    The calibration data is used only by the refinement.
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau != 1.0:
            raise ValueError(
                f"`WeightMatching` matches by weights only, so `tau` must be 1, got {self.tau}. Use `DualSpace` "
                "instead."
            )
