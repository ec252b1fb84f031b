"""Similarity measures of features, merge losses, and temperatures of heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_zipit.functional.checks import check_square


def correlation(covariance: Tensor) -> Tensor:
    """Compute the Pearson correlation from a covariance matrix.

    The row and column of a dead feature (variance zero) are 0, including the diagonal.

    Args:
        covariance: symmetric covariance matrix, ``(n, n)``.

    Returns:
        Correlations in [-1, 1], ``(n, n)``, of the dtype of ``covariance``.

    Raises:
        ValueError: if ``covariance`` is not a square matrix.

    Example:
        >>> correlation(torch.tensor([[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
        tensor([[1.0000, 0.5000, 0.0000],
                [0.5000, 1.0000, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    check_square(covariance, "covariance")
    variance = covariance.diagonal()
    alive = variance > 0
    inverse_deviation = torch.where(alive, variance.where(alive, torch.ones_like(variance)).rsqrt(), 0.0)
    scaled = covariance * inverse_deviation[:, None]
    scaled.mul_(inverse_deviation[None, :]).clamp_(-1.0, 1.0)
    scaled.diagonal().copy_(alive.to(scaled.dtype))
    return scaled


def zip_loss(similarity: Tensor, labels: Tensor) -> float:
    """Compute the ratio of variance that is lost when the mean of its cluster replaces every feature.

    Features are scaled to variance 1. The remaining variance is the sum over clusters of the mean similarity within
    the cluster times its size. This is the objective of k-means.

    Args:
        similarity: the similarity of the features, ``(n, n)``.
        labels: int64 ``(n,)``, the cluster of each feature.

    Returns:
        A number from 0 (only equal features are merged) to 1.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.0, 0.8], [0.0, 1.0, 0.0], [0.8, 0.0, 1.0]])
        >>> round(zip_loss(similarity, torch.tensor([0, 1, 0])), 4)
        0.0667
    """
    return float(zip_losses(similarity, labels, 1).clamp(0, 1))


def zip_losses(similarity: Tensor, labels: Tensor, num_models: int) -> Tensor:
    """Compute the ratio of variance that each model loses when the mean of its cluster replaces every feature.

    The loss of a model is Σ_i E(x_i - z_i)² / Σ_i E x_i² over its features, where z_i is the mean of the cluster of
    feature i. It is above 1 if the clusters vary more than the features. The mean of the losses, weighted by the
    variances of the models, is :func:`zip_loss`.

    Args:
        similarity: the similarity of the features of all models, ``(N·C, N·C)``.
        labels: int64 ``(N·C,)``, the cluster of each feature.
        num_models: N.

    Returns:
        ``(N,)``, of the dtype of ``similarity``; 0 for a model without variance.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.9, 0.0, 0.0], [0.9, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0],
        ...                            [0.0, 0.0, 0.0, 1.0]])
        >>> zip_losses(similarity, torch.tensor([0, 0, 1, 1]), num_models=2)
        tensor([0.0500, 0.5000])
    """
    labels = labels.to(similarity.device)
    sizes = labels.bincount().to(similarity.dtype)
    of_cluster = similarity.new_zeros(len(sizes), len(labels)).index_add_(0, labels, similarity)
    with_mean = of_cluster.gather(0, labels[None])[0] / sizes[labels]  # similarity to the mean of its cluster
    of_means = with_mean.new_zeros(len(sizes)).index_add_(0, labels, with_mean) / sizes
    variance = similarity.diagonal()
    lost = (variance - 2 * with_mean + of_means[labels]).view(num_models, -1).sum(1)
    total = variance.reshape(num_models, -1).sum(1)
    return torch.where(total > 0, lost / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)


def agreement(features: Tensor, merged: Tensor) -> Tensor:
    """Compute the correlation of each source feature with each merged feature, on the same samples.

    Args:
        features: features of a source model, ``(samples, C)`` or ``(samples, C, …)``. Each position is a sample.
        merged: features of the merged network, ``(samples, W)`` or ``(samples, W, …)``.

    Returns:
        float64 ``(C, W)``; 0 for constant features.

    Raises:
        ValueError: if the numbers of samples differ.

    Example:
        >>> source = torch.tensor([[1.0, 0.0], [2.0, 1.0], [3.0, 0.0]])
        >>> agreement(source, -source).round(decimals=2)
        tensor([[-1.,  0.],
                [ 0., -1.]], dtype=torch.float64)
    """
    own, other = (each.double().movedim(1, -1).flatten(0, -2) for each in (features, merged))
    if len(own) != len(other):
        raise ValueError(
            f"`features` has {len(own)} samples and `merged` has {len(other)}. Pass features of the same input."
        )
    joint = torch.cat([own, other], 1)
    centred = joint - joint.mean(0)
    return correlation(centred.T @ centred)[: own.shape[1], own.shape[1] :]


def by_chance(similarity: Tensor, labels: Tensor, num_models: int) -> tuple[float, float]:
    """Compute the mean similarity within clusters under random assignment of each model's features to the clusters.

    Args:
        similarity: the similarity of the features of all models, ``(N·C, N·C)``.
        labels: int64 ``(N·C,)``, the cluster of each feature.
        num_models: N.

    Returns:
        The expectation and the standard deviation of that mean, under the assumption that pairs are independent. NaN if
        no two features share a cluster.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.0, 0.8, 0.2], [0.0, 1.0, 0.2, 0.8], [0.8, 0.2, 1.0, 0.0],
        ...                            [0.2, 0.8, 0.0, 1.0]])
        >>> tuple(round(value, 2) for value in by_chance(similarity, torch.tensor([0, 1, 0, 1]), num_models=2))
        (0.5, 0.21)
    """
    size = len(labels) // num_models
    blocks = [rows.unflatten(1, (num_models, size)) for rows in similarity.split(size)]  # N of (C, N, C)
    own = similarity.diagonal().view(num_models, size)
    count = (size**2 - size * torch.eye(num_models).to(similarity)).clamp(min=1)
    mean = (torch.stack([block.sum((0, 2)) for block in blocks]) - own.sum(1).diag()) / count  # (N, N)
    square = torch.stack([torch.linalg.vector_norm(block, dim=(0, 2)).square() for block in blocks])
    variance = ((square - own.square().sum(1).diag()) / count - mean.square()).clamp(min=0)
    labels = labels.to(similarity.device)
    members = similarity.new_zeros(num_models, int(labels.max()) + 1)  # number of features of a model in a cluster
    members.scatter_add_(1, labels.view(num_models, size), torch.ones_like(own))
    pairs = members @ members.T - size * torch.eye(num_models).to(similarity)  # (N, N), each pair twice
    return float((pairs * mean).sum() / pairs.sum()), float((2 * (pairs * variance).sum()).sqrt() / pairs.sum())


def loss_barrier(losses: Sequence[float]) -> float:
    """Compute the loss barrier between two networks (Git Re-Basin, section 2).

    Args:
        losses: the losses along the path between the networks, including both ends.

    Returns:
        The highest loss minus the mean of the first and the last loss.

    Raises:
        ValueError: if there are fewer than two losses.

    Example:
        >>> loss_barrier([0.5, 2.0, 0.7])
        1.4
    """
    if len(losses) < 2:
        raise ValueError(f"`losses` must hold at least the losses of the two ends, got {len(losses)} values.")
    return max(losses) - (losses[0] + losses[-1]) / 2


def fit_temperatures(
    logits: Mapping[str, Tensor], weights: Tensor | None = None, bounds: tuple[float, float] = (1e-3, 1e3)
) -> dict[str, float]:
    """Fit a temperature T per head, so that softmax(logits / T) is comparable between heads.

    Every head gets the same mean confidence (highest probability) over samples to which N tasks contribute equally. It
    is the confidence of a head of K classes that is certain of its own samples and undecided about all others:
    1/N + (1 - 1/N) / K for the smallest K. Confidence falls as T rises, so bisection finds T.

    Args:
        logits: the logits of each head on the same samples, ``(samples, classes)``. Heads may have different numbers of
            classes.
        weights: sample weights ``(samples,)`` for tasks that are not equally frequent; equal by default.
        bounds: the lowest and the highest temperature.

    Returns:
        The temperature of each head; 1 for a head whose confidence does not depend on it.

    Raises:
        ValueError: if logits have another shape, no samples, or NaN or Inf.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> found = fit_temperatures({"a": logits, "b": 3 * logits})
        >>> {task: round(found[task] / found["a"], 3) for task in found}
        {'a': 1.0, 'b': 3.0}
    """
    for task, output in logits.items():
        if output.ndim != 2 or not output.numel():
            raise ValueError(
                f"The logits of head {task!r} must have shape (samples, classes) with at least one sample, got shape "
                f"{(*output.shape,)}."
            )
        if not output.isfinite().all():
            raise ValueError(f"The logits of head {task!r} contain NaN or Inf. Pass finite logits.")
    # The confidence of a head of one class does not depend on T. A single head has no other to be compared with.
    fitted = {task: output.double() for task, output in logits.items() if output.shape[1] > 1 and len(logits) > 1}
    share = 1 / len(logits) if logits else 1.0
    confidence = max((share + (1 - share) / output.shape[1] for output in fitted.values()), default=1.0)
    found = dict.fromkeys(logits, 1.0)
    for task, output in fitted.items():
        counts = torch.ones(len(output)) if weights is None else weights
        shares = (counts / counts.sum()).to(output)
        if (output == output[:, :1]).all():
            continue
        low, high = (math.log(bound) for bound in bounds)
        while high - low > 1e-9:
            middle = (low + high) / 2
            surer = (output / math.exp(middle)).softmax(-1).amax(-1) @ shares > confidence
            low, high = (middle, high) if surer else (low, middle)
        found[task] = math.exp((low + high) / 2)
    return found
