"""How weights of models that were trained from one checkpoint become one: as changes to that checkpoint."""

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
    """Makes one change of weights out of those of N models; subclass it to bring your own."""

    @abstractmethod
    def __call__(self, vectors: Tensor) -> Tensor:
        """Combine task vectors: what training changed since the common base.

        Args:
            vectors: ``(N, P)``, the changes of all shared parameters of each model.

        Returns:
            ``(P,)``, what is added to the base.
        """


@dataclass(frozen=True)
class TaskArithmetic(Combination):
    """The sum of all changes, scaled (Task arithmetic, arXiv 2212.04089); with ``scale=1/N`` it is the average.

    Args:
        scale: what the sum is multiplied with.
    """

    scale: float = 0.4

    def __call__(self, vectors: Tensor) -> Tensor:
        return self.scale * vectors.sum(0)


@dataclass(frozen=True)
class Ties(Combination):
    """The largest changes only, where the models agree on the sign (TIES-Merging, arXiv 2306.01708).

    Args:
        density: the share of each model's changes that is kept, above 0 to 1.
        scale: what the result is multiplied with.

    Raises:
        ValueError: if ``density`` is out of range.
    """

    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"`density` must lie above 0 and not above 1, got {self.density}.")

    def __call__(self, vectors: Tensor) -> Tensor:
        return self.scale * F.ties(vectors, self.density)


@dataclass(frozen=True)
class Dare(Combination):
    """Drops changes at random and scales up the others, before they are combined (DARE, arXiv 2311.03099).

    Args:
        drop: the share that is dropped, 0 to below 1.
        combination: what combines the rest.
        seed: of what is dropped.

    Raises:
        ValueError: if ``drop`` is out of range.
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
    """Set the parameters of a trunk to those of the base and the combined changes of the sources.

    Buffers, such as running statistics, stay as they are.

    Args:
        target: a module with parameters under the names that they have in the sources.
        sources: the source networks, matched by number.
        base: the network that they were trained from.
        how: what combines their changes.

    Raises:
        ArchitectureMismatchError: if the base lacks a parameter, or has it in another shape.
    """
    names = [name for name, parameter in target.named_parameters() if parameter.is_floating_point()]
    problems = []
    for name in names:
        shape = attrgetter(name)(sources[0]).shape
        known = dict(base.named_parameters(remove_duplicate=False)).get(name)
        if known is None or known.shape != shape:
            found = "does not have it" if known is None else f"has it in shape {tuple(known.shape)}"
            problems.append(f"Parameter `{name}` has shape {tuple(shape)} in the sources, but the base {found}.")
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
