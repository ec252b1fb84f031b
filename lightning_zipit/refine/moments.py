"""Mean and variance of features over batches, positions and processes."""

from __future__ import annotations

import torch
from torch import Tensor


class FeatureMoments:
    """Mean and variance per feature. Every sample counts once, independent of the split into batches.

    Args:
        size: the number of features.
        device: the device of the samples.
        origin: values near the means, to keep precision; identical on every process; 0 by default.

    Attributes:
        sums: per feature the number of samples, the sum of their offsets from the origin, and the sum of the squared
            offsets, float64 ``(3, features)``. The sums of several processes can be added.
    """

    def __init__(self, size: int, device: torch.device, origin: Tensor | None = None) -> None:
        self.sums = torch.zeros(3, size, dtype=torch.float64, device=device)
        self.origin = torch.zeros_like(self.sums[0]) if origin is None else origin.detach().double().clone()

    def add(self, rows: Tensor) -> None:
        """Add samples ``(samples, features)``."""
        offsets = rows.double() - self.origin
        count = torch.full_like(self.sums[0], len(rows))
        self.sums += torch.stack([count, offsets.sum(0), offsets.square().sum(0)])

    def add_summary(self, count: int, mean: Tensor, variance: Tensor) -> None:
        """Add samples by their number, and their mean and variance (divided by the number) per feature."""
        offset = mean.double() - self.origin
        squares = variance.double() + offset.square()
        self.sums += count * torch.stack([torch.ones_like(offset), offset, squares])

    @property
    def count(self) -> float:
        """The number of samples."""
        return float(self.sums[0].max())

    @property
    def mean(self) -> Tensor:
        """Mean per feature, ``(features,)``."""
        return self.origin + self.sums[1] / self.sums[0]

    @property
    def variance(self) -> Tensor:
        """Variance per feature, ``(features,)``, with Bessel's correction."""
        count, total, squares = self.sums
        return ((squares - total.square() / count) / (count - 1).clamp(min=1)).clamp(min=0)
