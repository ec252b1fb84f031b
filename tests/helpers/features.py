"""Features of made-up models, side by side, and their correlations."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_zipit import functional as F


def mixed_features(samples: int, size: int, seed: int = 0) -> Tensor:
    """Features that share hidden factors, so that some correlate strongly: float64 ``(samples, size)``."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(samples, max(size // 3, 1), generator=generator, dtype=torch.float64)
    loadings = torch.randn(factors.shape[1], size, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    return factors @ loadings + 0.5 * noise


def shuffled_copies(features: Tensor, num_models: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """The same features in N models, each but the first in an order of its own.

    Returns:
        The features side by side ``(samples, N·C)``, and per model the original number of each of its features.
    """
    generator = torch.Generator().manual_seed(seed)
    size = features.shape[1]
    orders = [torch.arange(size)] + [torch.randperm(size, generator=generator) for _ in range(num_models - 1)]
    return torch.cat([features[:, order] for order in orders], dim=1), orders


def correlations(features: Tensor) -> Tensor:
    """Of features ``(samples, n)``: float64 ``(n, n)``, dead features 0."""
    return F.correlation(features.double().T.cov())
