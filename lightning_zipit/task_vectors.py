"""Task vectors: merge the weights of models that were trained from a common base checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_zipit import functional as F
from lightning_zipit.errors import ArchitectureMismatchError

__all__ = ["Combination", "Dare", "TaskArithmetic", "Ties", "combine_into"]


class Combination(ABC):
    """Base class of methods that combine task vectors. Subclass it to write your own."""

    @abstractmethod
    def __call__(self, vectors: Tensor) -> Tensor:
        """Combine task vectors. A task vector is the difference of a model's parameters from the common base.

        Args:
            vectors: ``(N, P)``, the task vector of all shared parameters of each model.

        Returns:
            ``(P,)``, the combined vector, which is added to the base.
        """


@dataclass(frozen=True)
class TaskArithmetic(Combination):
    """Scaled sum of all task vectors (Task arithmetic, arXiv 2212.04089). With ``scale=1/N`` it is the average.

    Args:
        scale: factor for the sum.
    """

    scale: float = 0.4

    def __call__(self, vectors: Tensor) -> Tensor:
        return self.scale * vectors.sum(0)


@dataclass(frozen=True)
class Ties(Combination):
    """Mean of the largest changes whose sign agrees with the majority of models (TIES-Merging, arXiv 2306.01708).

    Args:
        density: the ratio of each model's changes that is kept, above 0 and at most 1.
        scale: factor for the result.

    Raises:
        ValueError: if ``density`` is not above 0 and at most 1.
    """

    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"`density` must be above 0 and at most 1, got {self.density}.")

    def __call__(self, vectors: Tensor) -> Tensor:
        return self.scale * F.ties(vectors, self.density)


@dataclass(frozen=True)
class Dare(Combination):
    """Random dropping of changes before they are combined; the others are scaled up (DARE, arXiv 2311.03099).

    Args:
        drop: the ratio of changes that are dropped, at least 0 and below 1.
        combination: the method that combines the remaining changes.
        seed: random seed for the dropped changes.

    Raises:
        ValueError: if ``drop`` is not at least 0 and below 1.
    """

    drop: float = 0.5
    combination: Combination = field(default_factory=TaskArithmetic)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.drop < 1.0:
            raise ValueError(f"`drop` must be at least 0 and below 1, got {self.drop}.")

    def __call__(self, vectors: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        kept = torch.rand(vectors.shape, generator=generator) >= self.drop
        return self.combination(vectors * kept.to(vectors.device) / (1 - self.drop))


def combine_into(target: nn.Module, sources: Sequence[nn.Module], base: nn.Module, how: Combination) -> None:
    """Set the parameters of a trunk to the base plus the combined task vectors of the sources.

    Buffers, such as running statistics, are not changed.

    Args:
        target: a module with the parameter names of the sources.
        sources: the source networks, whose features are matched by index.
        base: the network from which the sources were trained.
        how: the method that combines the task vectors.

    Raises:
        ArchitectureMismatchError: if a parameter of the sources is missing in the base, or has another shape.
    """
    names = [name for name, parameter in target.named_parameters() if parameter.is_floating_point()]
    problems = []
    for name in names:
        shape = attrgetter(name)(sources[0]).shape
        known = dict(base.named_parameters(remove_duplicate=False)).get(name)
        if known is None or known.shape != shape:
            found = "is missing" if known is None else f"has shape {tuple(known.shape)}"
            problems.append(
                f"Parameter `{name}` has shape {tuple(shape)} in the sources, but {found} in the base: give the "
                "network from which the sources were trained as the base."
            )
    if problems:
        raise ArchitectureMismatchError.collect(problems)

    def flat(network: nn.Module) -> Tensor:
        return parameters_to_vector([attrgetter(name)(network).detach().cpu().float() for name in names])

    with torch.no_grad():
        start = flat(base)
        merged = start + how(torch.stack([flat(source) - start for source in sources]))
        parts = [torch.empty(target.get_parameter(name).shape) for name in names]
        vector_to_parameters(merged, parts)
        for name, part in zip(names, parts, strict=True):
            target.get_parameter(name).copy_(part)
