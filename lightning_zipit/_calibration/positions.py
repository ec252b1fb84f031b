"""Random choice of positions in images and sequences, identical on every process."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_zipit._common.calls import Call


def marks(x: Call) -> Tensor:
    """Compute a number for each sample of a batch from its content only, ``(batch,)``."""
    batched = [tensor for tensor, chosen in zip(x.tensors, x.batched, strict=True) if chosen]
    return torch.stack([_marks_of(tensor) for tensor in batched]).sum(0)


def _marks_of(x: Tensor) -> Tensor:
    rows = x.detach().reshape(len(x), -1).contiguous()
    return rows.view(torch.uint8).sum(1, dtype=torch.int64)


def choose_positions(marks: Tensor, size: int, count: int) -> Tensor:
    """Choose pseudo-random positions for each sample.

    The choice depends on the sample only, so it is the same on every process.

    Args:
        marks: ``(batch,)``, see :func:`marks`.
        size: the number of positions of a sample.
        count: the number of positions to choose, at most ``size``.

    Returns:
        ``(batch, count)``, without duplicates within a sample: consecutive entries of one fixed permutation, starting
        at the sample's mark.
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size)).to(marks.device)
    return order[(marks[:, None] + torch.arange(count, device=marks.device)) % size]


class ChosenPositions:
    """A random choice of positions for every sample of a batch.

    Args:
        batch: the input of the networks. The choice for a sample depends on this sample only.
        count: the number of positions per sample.
    """

    def __init__(self, batch: Call, count: int) -> None:
        self._marks, self._count = marks(batch), count
        self._chosen: dict[int, Tensor] = {}  # number of positions of a sample → chosen positions

    def take(self, features: Tensor) -> Tensor:
        """Select the chosen positions of features.

        Args:
            features: ``(features, batch, …)``.

        Returns:
            ``(features, batch, positions)``, or the features unchanged if they have at most ``count`` positions.
        """
        if features.ndim < 3 or features.shape[1] % len(self._marks):
            return features
        batch, size = features.shape[1], features[0, 0].numel()
        if size <= self._count:
            return features
        if size not in self._chosen:
            self._chosen[size] = choose_positions(self._marks, size, self._count)
        index = self._chosen[size].repeat_interleave(batch // len(self._marks), 0)  # each window counts as a sample
        if features.stride(0) == 1:  # channels last: the features of a position are contiguous
            rows = features.flatten(1).T
            index = index + size * torch.arange(batch, device=index.device)[:, None]
            return rows.index_select(0, index.flatten()).view(batch, -1, rows.shape[1]).movedim(2, 0)
        return features.flatten(2).gather(2, index.expand(len(features), -1, -1))
