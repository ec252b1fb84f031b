"""Merge and unmerge matrices of a matching, and TIES-Merging of weight changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def merge_matrices(
    labels: Tensor, num_models: int, weights: Sequence[float] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the merge and unmerge matrices of a matching (ZipIt!, section 4).

    Args:
        labels: int64 ``(n,)``, the merged feature that each source feature becomes.
        num_models: the number of models that the features come from.
        weights: the weight of each model in the average of a cluster; see :func:`merge_shares`.

    Returns:
        The merge matrices M_i ``(W, C)`` and the unmerge matrices U_i ``(C, W)``. A merge matrix averages each cluster:
        the rows of ``[M_1 … M_N]`` sum to 1. An unmerge matrix copies a merged feature back.

    Raises:
        ValueError: if ``labels`` is not an int64 vector whose length is a multiple of ``num_models``, or skips a
            number. Also if ``weights`` does not hold one non-negative number per model, at least one of them positive.

    Example:
        >>> merge, unmerge = merge_matrices(torch.tensor([0, 1, 1, 0]), num_models=2)
        >>> merge[1]
        tensor([[0.0000, 0.5000],
                [0.5000, 0.0000]])
        >>> unmerge[1]
        tensor([[0., 1.],
                [1., 0.]])
    """
    if labels.ndim != 1 or num_models < 1 or len(labels) % num_models:
        raise ValueError(
            f"`labels` must be a vector whose length is a multiple of num_models={num_models}, got "
            f"{tuple(labels.shape)}."
        )
    if labels.dtype != torch.int64 or not torch.equal(
        labels.unique(), torch.arange(int(labels.max()) + 1, device=labels.device)
    ):
        raise ValueError("`labels` must be int64 and contain every number from 0 to the highest label.")
    one_hot = torch.nn.functional.one_hot(labels).to(torch.get_default_dtype())  # (n, W)
    averaging = one_hot.T * merge_shares(labels, num_models, weights).to(one_hot)  # (W, n)
    return list(averaging.chunk(num_models, dim=1)), list(one_hot.chunk(num_models, dim=0))


def merge_shares(labels: Tensor, num_models: int, weights: Sequence[float] | None = None) -> Tensor:
    """Compute the weight of each feature in the average of its cluster.

    The weight is the entry of ``[M_1 … M_N]`` in the row of the cluster and the column of the feature.

    Args:
        labels: int64 ``(n,)``, the merged feature that each source feature becomes.
        num_models: the number of models that the features come from.
        weights: the weight of each model; equal by default, and in clusters whose models all have weight 0.

    Returns:
        float64 ``(n,)``. The weights within a cluster sum to 1.

    Raises:
        ValueError: if ``weights`` does not hold one non-negative number per model, at least one of them positive.

    Example:
        >>> merge_shares(torch.tensor([0, 1, 1, 0]), num_models=2, weights=(3, 1))
        tensor([0.7500, 0.7500, 0.2500, 0.2500], dtype=torch.float64)
    """
    shares = labels.bincount().double().reciprocal()[labels]
    if weights is None:
        return shares
    check_weights(weights, num_models)
    own = torch.tensor(weights, dtype=torch.float64, device=labels.device)
    own = own.repeat_interleave(len(labels) // num_models)  # (n,)
    totals = torch.zeros(int(labels.max()) + 1).to(own).index_add_(0, labels, own)[labels]
    return torch.where(totals > 0, own / totals, shares)


def check_weights(weights: Sequence[float], num_models: int) -> None:
    """Check the weights of models.

    Raises:
        ValueError: if ``weights`` does not hold one non-negative number per model, at least one of them positive.
    """
    numbers = all(isinstance(weight, (int, float)) and 0 <= weight < math.inf for weight in weights)
    if len(weights) != num_models or not numbers or not any(weights):
        raise ValueError(
            f"`weights` must hold {num_models} numbers, one per model, none negative and at least one above 0; got "
            f"{list(weights)}."
        )


def ties(vectors: Tensor, density: float) -> Tensor:
    """Combine weight changes: trim, elect a sign, average the changes of that sign (TIES-Merging, arXiv 2306.01708).

    Args:
        vectors: ``(N, P)``, the changes of P weights in each of N models.
        density: the ratio of each model's changes to keep, the largest first; above 0 and at most 1.

    Returns:
        ``(P,)``; 0 where all changes are trimmed or cancel.

    Raises:
        ValueError: if ``density`` is out of range, or ``vectors`` is not a matrix.

    Example:
        >>> ties(torch.tensor([[3.0, -2.0, 0.1], [1.0, 4.0, -0.2]]), density=0.6)
        tensor([2., 4., 0.])
    """
    if vectors.ndim != 2:
        raise ValueError(f"`vectors` must be a matrix, got shape {tuple(vectors.shape)}.")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"`density` must be above 0 and at most 1, got {density}.")
    size = vectors.shape[1]
    trimmed = max(size - math.ceil(density * size), 0)
    kept = vectors.clone()
    if trimmed:
        threshold = vectors.abs().kthvalue(trimmed, dim=1, keepdim=True).values
        kept[vectors.abs() <= threshold] = 0
    sign = kept.sum(0).sign()
    agreeing = (kept.sign() == sign) & (kept != 0)
    return (kept * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
