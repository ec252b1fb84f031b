"""Canonical correlation analysis of the features of several models (CCA Merge, arXiv 2407.05385)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_zipit.functional.checks import check_matching
from lightning_zipit.functional.matching import permute
from lightning_zipit.functional.measures import correlation

TIE = 1e-9
"""Weight of the one-to-one assignment relative to canonical correlations, which are at most 1.

The assignment decides only if all correlations are 0.
"""
CONVERGED = 1e-12
"""Iteration stops when the total correlation grows by less than this ratio."""


def canonical_correlations(covariance: Tensor, gamma: float = 0.0) -> Tensor:
    """Compute the canonical correlations of two models' features.

    These are the correlations of the best pairs of linear combinations.

    Args:
        covariance: the covariance of the features of both models, ``(2·C, 2·C)``.
        gamma: ridge on the diagonal of each model's covariance, as a ratio to the mean variance.

    Returns:
        float64 ``(C,)`` in descending order: the singular values of Σ_A^(-1/2) Σ_AB Σ_B^(-1/2).

    Raises:
        ValueError: if ``covariance`` is not square or not finite, or its size is odd.

    Example:
        >>> covariance = torch.tensor([[1.0, 0.0, 0.6, 0.0], [0.0, 1.0, 0.0, 0.2], [0.6, 0.0, 1.0, 0.0],
        ...                            [0.0, 0.2, 0.0, 1.0]])
        >>> canonical_correlations(covariance)
        tensor([0.6000, 0.2000], dtype=torch.float64)
    """
    whitened, _, _ = _whiten(covariance, 2, gamma)
    return torch.linalg.svdvals(whitened[0, 1])


def align(covariance: Tensor, num_models: int, gamma: float, rounds: int = 100) -> tuple[list[Tensor], list[Tensor]]:
    """Compute linear maps from the features of N models to the features of the first, by canonical correlations.

    With Σ_A^(-1/2) Σ_AB Σ_B^(-1/2) = U S Vᵀ, canonical projections P_A = Σ_A^(-1/2) U and P_B = Σ_B^(-1/2) V, the map
    of model B is T = (P_B P_A⁻¹)ᵀ = Σ_A^(1/2) U Vᵀ Σ_B^(-1/2) (CCA Merge). The map whitens the features of B, rotates
    them to agree best with the features of A, and gives them the covariance of A.

    With three or more models, each round rotates every model to agree best with all others. The paper rotates each
    model to agree with the first; for two models the result is the same. Directions without any correlation follow
    :func:`~lightning_zipit.functional.permute`.

    Args:
        covariance: the covariance of the features of all models, ``(N·C, N·C)``.
        num_models: N.
        gamma: ridge on the diagonal of each model's covariance, as a ratio to the mean variance; above 0.
        rounds: the maximum number of rounds over all models.

    Returns:
        The maps T_i and their inverses, float64 ``(C, C)`` each, on the CPU. Those of the first model are the identity.

    Raises:
        ValueError: if ``covariance`` is not square or not finite, or its size is not a multiple of ``num_models``.

    Example:
        >>> covariance = torch.tensor([[4.0, 0.0, 0.0, 2.0], [0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0],
        ...                            [2.0, 0.0, 0.0, 1.0]])
        >>> (_, onto), _ = align(covariance, num_models=2, gamma=1e-9)
        >>> onto.round(decimals=4)
        tensor([[0., 2.],
                [1., 0.]], dtype=torch.float64)
    """
    whitened, roots, inverse_roots = _whiten(covariance, num_models, gamma)
    size = len(roots[0])
    assigned = torch.nn.functional.one_hot(permute(correlation(covariance), num_models), size).double()
    ties = TIE * assigned.unflatten(0, (num_models, size)).mT  # (N, C of the first, C)
    turns = [torch.eye(size, dtype=torch.float64)]
    turns += [_nearest_rotation(whitened[0, model] + ties[model]) for model in range(1, num_models)]
    total = 0.0
    for _ in range(rounds if num_models > 2 else 0):
        before, total = total, 0.0
        for model in range(1, num_models):
            others = [other for other in range(num_models) if other != model]
            wanted = torch.stack([turns[other] @ whitened[other, model] for other in others]).sum(0)
            turns[model] = _nearest_rotation(wanted + ties[model])
            total += float((turns[model] * wanted).sum())
        if total - before <= CONVERGED * abs(total):
            break
    identity = torch.eye(size, dtype=torch.float64)
    onto = [roots[0] @ turn @ inverse for turn, inverse in zip(turns, inverse_roots, strict=True)]
    back = [root @ turn.T @ inverse_roots[0] for turn, root in zip(turns, roots, strict=True)]
    return [identity, *onto[1:]], [identity.clone(), *back[1:]]


def mixed_similarity(covariance: Tensor, merge: Sequence[Tensor], unmerge: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute the correlation of the models' contributions to merged features, and each model's lost variance.

    Args:
        covariance: the covariance of the features of all models, ``(N·C, N·C)``.
        merge: M_i ``(W, C)`` of each model.
        unmerge: U_i ``(C, W)`` of each model.

    Returns:
        Two float64 vectors. The first holds the correlation of M_i x_i with M_j x_j for every pair of models and every
        merged feature that is not constant. The second, ``(N,)``, holds the mean ratio of a feature's variance that
        each model loses when x_i becomes U_i Σ_j M_j x_j.

    Example:
        >>> covariance = torch.tensor([[1.0, 0.6], [0.6, 1.0]])
        >>> half, whole = torch.tensor([[0.5]]), torch.tensor([[1.0]])
        >>> mixed_similarity(covariance, [half, half], [whole, whole])
        (tensor([0.6000], dtype=torch.float64), tensor([0.2000, 0.2000], dtype=torch.float64))
    """
    count = len(merge)
    covariance = covariance.detach().double().cpu()
    blocks = covariance.unflatten(0, (count, -1)).unflatten(2, (count, -1))
    given = torch.stack(
        [
            torch.stack([((merge[a].double() @ blocks[a, :, b]) * merge[b]).sum(1) for b in range(count)])
            for a in range(count)
        ]
    )  # (N, N, W)
    power = given.diagonal(dim1=0, dim2=1).mT  # (N, W)
    matched = []
    for a in range(count):
        for b in range(a + 1, count):
            alive = (power[a] > 0) & (power[b] > 0)
            matched.append(given[a, b][alive] / (power[a] * power[b])[alive].sqrt())
    merging = torch.cat([matrix.double() for matrix in merge], 1)  # (W, N·C)
    losses = []
    for own, back in enumerate(unmerge):
        joint = back.double() @ merging  # (C, N·C)
        variance, with_own = blocks[own, :, own].diagonal(), covariance.unflatten(1, (count, -1))[:, own]
        lost = variance - 2 * (joint * with_own.T).sum(1) + ((joint @ covariance) * joint).sum(1)
        alive = variance > 0
        losses.append((lost[alive] / variance[alive]).mean() if alive.any() else lost.new_zeros(()))
    return torch.cat([*matched, covariance.new_zeros(0)]), torch.stack(losses)


def _whiten(covariance: Tensor, num_models: int, gamma: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute covariances of whitened features ``(N, N, C, C)``, and each model's root and inverse root covariance."""
    check_matching(covariance, num_models)
    if not covariance.isfinite().all():
        raise ValueError("`covariance` contains NaN or Inf. Pass a finite covariance matrix.")
    size = len(covariance) // num_models
    blocks = covariance.detach().double().cpu().unflatten(0, (num_models, size)).unflatten(2, (num_models, size))
    roots, inverse_roots = [], []
    for model in range(num_models):
        own = blocks[model, :, model]
        values, vectors = torch.linalg.eigh(own)
        spread = own.diagonal().mean()
        ridge = gamma * (spread if spread > 0 else torch.ones_like(spread))
        scale = (values.clamp(min=0) + ridge).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        roots.append((vectors * scale) @ vectors.T)
        inverse_roots.append((vectors / scale) @ vectors.T)
    whitened = torch.stack(
        [
            torch.stack([inverse_roots[a] @ blocks[a, :, b] @ inverse_roots[b] for b in range(num_models)])
            for a in range(num_models)
        ]
    )
    return whitened, roots, inverse_roots


def _nearest_rotation(matrix: Tensor) -> Tensor:
    """Return the orthogonal matrix Q that maximizes tr(Qᵀ matrix): U Vᵀ of its singular vectors."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right
