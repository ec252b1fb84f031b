"""Chooses positions of images and sequences at random, the same on every process."""

from __future__ import annotations

import torch
from torch import Tensor


def marks(x: Tensor) -> Tensor:
    """A number for each sample of a batch that depends on nothing but its content, ``(batch,)``."""
    return x.detach().contiguous().view(torch.uint8).flatten(1).sum(1, dtype=torch.int64)


def choose_positions(marks: Tensor, size: int, count: int) -> Tensor:
    """Positions that look random and depend on the sample alone: the same on whatever process it is seen.

    Args:
        marks: ``(batch,)``, see :func:`marks`.
        size: how many positions there are.
        count: how many to choose, at most ``size``.

    Returns:
        ``(batch, count)``, all different: a run of one fixed permutation, which begins at the sample's mark.
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size)).to(marks.device)
    return order[(marks[:, None] + torch.arange(count, device=marks.device)) % size]


class ChosenPositions:
    """Some positions of every sample of a batch.

    Args:
        batch: the input of the networks. The choice for a sample depends on the sample alone.
        count: how many positions of each sample to take.
    """

    def __init__(self, batch: Tensor, count: int) -> None:
        self._marks, self._count = marks(batch), count
        self._chosen: dict[int, Tensor] = {}  # by the number of positions that there are

    def take(self, features: Tensor) -> Tensor:
        """Take these positions of features.

        Args:
            features: ``(features, batch, …)``.

        Returns:
            ``(features, batch, positions)``; the features themselves if they have no more positions than are taken.
        """
        if features.ndim < 3 or features.shape[1] % len(self._marks):
            return features
        batch, size = features.shape[1], features[0, 0].numel()
        if size <= self._count:
            return features
        if size not in self._chosen:
            self._chosen[size] = choose_positions(self._marks, size, self._count)
        index = self._chosen[size].repeat_interleave(batch // len(self._marks), 0)  # windows are samples
        if features.stride(0) == 1:  # the features of a position lie next to each other
            rows = features.flatten(1).T
            index = index + size * torch.arange(batch, device=index.device)[:, None]
            return rows.index_select(0, index.flatten()).view(batch, -1, rows.shape[1]).movedim(2, 0)
        return features.flatten(2).gather(2, index.expand(len(features), -1, -1))
