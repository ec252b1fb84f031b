"""Matchers: from the similarity of a feature space to labels, or matrices, that say what is merged with what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_zipit import functional as F
from lightning_zipit._matching.cca import align
from lightning_zipit.functional.checks import width_of
from lightning_zipit.functional.matching import Linkage

SimilarityKind = Literal["correlation", "absolute", "cosine", "covariance"]

OWN_MODEL_HANDICAP = 1e-6

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
    "Matcher",
    "Optimal",
    "Permute",
    "WeightMatching",
]


class DenseMaps(NamedTuple):
    """Merged features that are linear combinations of the models' features: what a matcher may return for labels.

    Attributes:
        merge: of each model M_i ``(W, C)``: the merged features are Σ_i M_i x_i, with all models counting the same.
        unmerge: of each model U_i ``(C, W)``: what stands for its features is U_i times the merged ones.
    """

    merge: Sequence[Tensor]
    unmerge: Sequence[Tensor]


class Matcher(ABC):
    """Decides which features of N models become one; subclass it to bring your own.

    Attributes:
        similarity: what it has to be given, whatever ``similarity=`` of a merge says: ``"covariance"`` for one that
            returns :class:`DenseMaps`, which depend on how features are scaled; ``None`` where anything will do.
    """

    similarity: ClassVar[SimilarityKind | None] = None

    @abstractmethod
    def __call__(self, similarity: Tensor, num_models: int) -> Tensor | DenseMaps:
        """Match the features of one space.

        Args:
            similarity: float64 ``(N·C, N·C)``, the models side by side; dead features have zeros only.
            num_models: N.

        Returns:
            int64 labels ``(N·C,)`` with C clusters: the merged feature that each source feature becomes; or dense maps.
        """


class AnyWidthMatcher(Matcher):
    """A matcher that can leave more or fewer features than one model has, as ``width=`` of a merge asks for."""

    @abstractmethod
    def __call__(self, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor | DenseMaps:
        """Match the features of one space.

        Args:
            similarity: float64 ``(N·C, N·C)``, the models side by side; dead features have zeros only.
            num_models: N.
            width: how many features to leave, 1 to N·C; C by default.

        Returns:
            int64 labels ``(N·C,)`` with ``width`` clusters; or dense maps of that width.
        """


@dataclass(frozen=True)
class GreedyZip(AnyWidthMatcher):
    """Zip features across and within models, the most similar pair first (ZipIt!, section 4.1).

    Dead features (constant on the calibration data) are set aside first, one of each model to a cluster, as far as
    every model has some: as they have similarity 0 to everything, the greedy search would else leave them alone and
    merge live features in their place. Where the data cannot tell features apart (few samples, or features that are
    active on the same few), a partner in another model goes first: similarities are compared in float32, and those
    within a model are lowered by a millionth.

    Args:
        alpha: what the similarity of a merged cluster is multiplied with, 0 to 1; see
            :func:`~lightning_zipit.functional.greedy_zip`.
        beta: the share of each model's merges that may happen inside the model, 0 to 1.

    Raises:
        ValueError: if ``alpha`` or ``beta`` lies outside 0 to 1.

    Example:
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
        width = width_of(similarity, num_models, width)
        size = len(similarity) // num_models
        dead = (similarity.diagonal() == 0).reshape(num_models, size)
        paired = int(dead.sum(1).min())
        aside = dead & (dead.cumsum(1) <= paired)
        live = (~aside).flatten().nonzero().flatten()
        # Where the size is free, dead features share one place if they can, and live ones get the rest.
        spare = paired if width == size else max(width - len(live), min(paired, 1, width - 1))
        labels = torch.empty(len(similarity), dtype=torch.int64)
        if len(live):
            chosen = similarity if len(live) == len(similarity) else similarity[live][:, live]
            compared = chosen.to(torch.float32, copy=True)
            for own in range(num_models):
                block = slice(own * (size - paired), (own + 1) * (size - paired))
                compared[block, block].sub_(compared[block, block].abs(), alpha=OWN_MODEL_HANDICAP)
            zipped = F.greedy_zip(compared, num_models, width - spare, self.alpha, self.beta)
            labels[live.cpu()] = zipped
        places = max(spare, 1)
        labels[aside.flatten().cpu()] = width - places + torch.arange(num_models * paired) % places
        return labels


@dataclass(frozen=True)
class Permute(Matcher):
    """Match every model to the first, one feature to one, by assignment (Git Re-Basin, arXiv 2209.04836)."""

    def __call__(self, similarity: Tensor, num_models: int) -> Tensor:
        return F.permute(similarity, num_models)


@dataclass(frozen=True)
class Optimal(Matcher):
    """Pair the features of two models up, within or across them, with the highest total similarity (ZipIt!, appendix).

    Exact and slow: minutes for a space of 256 features a model; see :func:`~lightning_zipit.functional.optimal`.
    """

    def __call__(self, similarity: Tensor, num_models: int) -> Tensor:
        return F.optimal(similarity, num_models)


@dataclass(frozen=True)
class KMeans(AnyWidthMatcher):
    """Cluster the features of all models by k-means (ZipIt!, appendix); see :func:`~lightning_zipit.functional.kmeans`.

    Args:
        seed: of the centres to start from.
    """

    seed: int = 0

    def __call__(self, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor:
        return F.kmeans(similarity, num_models, seed=self.seed, width=width)


@dataclass(frozen=True)
class Average(Matcher):
    """Match features by their number: plain weight averaging."""

    def __call__(self, similarity: Tensor, num_models: int) -> Tensor:
        return F.average(len(similarity), num_models)


@dataclass(frozen=True)
class Agglomerative(AnyWidthMatcher):
    """Cluster features bottom up; see :func:`~lightning_zipit.functional.agglomerative`.

    Args:
        linkage: how similar two clusters are: as their members on ``"average"``, or as the least similar two
            (``"complete"``), or the most similar (``"single"``).

    Raises:
        ValueError: if ``linkage`` is none of these.
    """

    linkage: Linkage = "average"

    def __post_init__(self) -> None:
        if self.linkage not in get_args(Linkage):
            raise ValueError(f"`linkage` must be one of {get_args(Linkage)}, got {self.linkage!r}.")

    def __call__(self, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor:
        return F.agglomerative(similarity, num_models, self.linkage, width)


@dataclass(frozen=True)
class CycleConsistent(Matcher):
    """Match three models or more, one feature to one, all to all at once (C²M³, arXiv 2405.17897).

    ``Permute`` matches every model to the first; which is first then matters, and what the others have in common is
    lost. For two models both are the same.
    """

    def __call__(self, similarity: Tensor, num_models: int) -> Tensor:
        return F.cycle_consistent(similarity, num_models)


@dataclass(frozen=True)
class CCA(Matcher):
    """Align models by linear maps rather than one feature to one (CCA Merge, arXiv 2407.05385).

    The features of every model are turned into those of the first by its map T_i, which canonical correlation analysis
    of the activations gives; weights are averaged behind it: M_i = T_i / N and U_i = T_i⁻¹. For two models this is the
    method of the paper, with ``gamma`` taken relative to the features' variance. With more, they are turned to agree
    with all others, and not with the first alone; see :func:`~lightning_zipit._matching.cca.align`. The first model's
    features are the coordinates of all, because activation functions act in them: with a copy of it, T is the identity.

    Batch norm right behind a layer is folded into the layer, mapped with it, and set up anew, where the paper maps its
    scale, shift and statistics as if they were features. Spaces to which a dense map cannot be applied are matched as
    :class:`Permute` does, and the report says which and why.

    Args:
        gamma: what is added to the diagonal of each model's covariance, as a share of the mean variance. The higher,
            the less directions count in which features hardly vary.

    Raises:
        ValueError: if ``gamma`` is not above 0.

    Example:
        >>> covariance = torch.tensor([[4.0, 0.0, 0.0, 2.0], [0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0],
        ...                            [2.0, 0.0, 0.0, 1.0]])
        >>> CCA(gamma=1e-9)(covariance, num_models=2).unmerge[1].round(decimals=4)
        tensor([[0.0000, 1.0000],
                [0.5000, 0.0000]], dtype=torch.float64)
    """

    gamma: float = 1.0
    similarity: ClassVar[SimilarityKind | None] = "covariance"

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"`gamma` must be above 0, got {self.gamma}.")

    def __call__(self, similarity: Tensor, num_models: int) -> DenseMaps:
        onto, back = align(similarity, num_models, self.gamma)
        return DenseMaps(tuple(matrix / num_models for matrix in onto), tuple(back))


@dataclass(frozen=True)
class DualSpace(Matcher):
    """Match by weights and activations together (MuDSC, arXiv 2403.01753).

    The similarity of a space is τ·(cosine of weights) + (1 - τ)·(similarity of activations). As the weights of one
    space are in the order of those around it, all spaces are matched in turn until none changes any more.

    Args:
        tau: the share of the weights, 0 to 1.
        matcher: what turns a similarity into labels.
        rounds: how often all spaces are gone through, at most.
        seed: of the order in which they are.

    Raises:
        ValueError: if ``tau`` lies outside 0 to 1, ``rounds`` is below 1, or ``matcher`` is a ``DualSpace`` itself.
    """

    tau: float = 0.5
    matcher: Matcher = field(default_factory=Permute)
    rounds: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"`tau` must lie between 0 and 1, got {self.tau}.")
        if self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {self.rounds}.")
        if not isinstance(self.matcher, Matcher) or isinstance(self.matcher, DualSpace):
            raise ValueError(f"`matcher` must be a Matcher of similarities such as Permute(), got {self.matcher!r}.")
        if self.matcher.similarity is not None:
            raise ValueError(
                f"`matcher` must take any similarity, and {self.matcher!r} takes a {self.matcher.similarity} alone: "
                "use it by itself."
            )

    def __call__(self, similarity: Tensor, num_models: int) -> Tensor | DenseMaps:
        return self.matcher(similarity, num_models)


@dataclass(frozen=True)
class WeightMatching(DualSpace):
    """Match by weights alone, without data (Git Re-Basin, arXiv 2209.04836, algorithm 1).

    Calibration data then only serves the refinement that follows.
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau != 1.0:
            raise ValueError("`WeightMatching` looks at weights alone: `DualSpace` has a share `tau` of them.")
