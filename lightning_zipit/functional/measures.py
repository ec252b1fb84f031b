"""Similarity of features and networks, and the losses of merging."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_zipit.functional.checks import check_square


def correlation(covariance: Tensor) -> Tensor:
    """Pearson correlation from a covariance matrix.

    A dead feature (variance zero) has no correlation: its row and column, diagonal included, are 0.

    Args:
        covariance: symmetric, ``(n, n)``.

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
    """Ratio of the features' variance that is lost when every feature becomes the mean of its cluster.

    Features count as scaled to variance 1. The variance that is kept is Σ over clusters of the mean of their
    similarities, times their size: the objective of k-means.

    Args:
        similarity: of the features, ``(n, n)``.
        labels: int64 ``(n,)``, the cluster of each.

    Returns:
        From 0, if only equal features are merged, to 1.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.0, 0.8], [0.0, 1.0, 0.0], [0.8, 0.0, 1.0]])
        >>> round(zip_loss(similarity, torch.tensor([0, 1, 0])), 4)
        0.0667
    """
    return float(zip_losses(similarity, labels, 1).clamp(0, 1))


def zip_losses(similarity: Tensor, labels: Tensor, num_models: int) -> Tensor:
    """Ratio of the features' variance that each model loses when every feature becomes the mean of its cluster.

    Σ_i E(x_i - z_i)² / Σ_i E x_i² over the features of one model, with z_i the mean of the cluster of feature i. It is
    above 1 if the clusters vary more than the features. Weighted by the models' variances, the losses add up to
    :func:`zip_loss`.

    Args:
        similarity: of the features, ``(N·C, N·C)``.
        labels: int64 ``(N·C,)``, the cluster of each.
        num_models: N.

    Returns:
        Of the type of ``similarity``, ``(N,)``; 0 for a model without variance.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.9, 0.0, 0.0], [0.9, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0],
        ...                            [0.0, 0.0, 0.0, 1.0]])
        >>> zip_losses(similarity, torch.tensor([0, 0, 1, 1]), num_models=2)
        tensor([0.0500, 0.5000])
    """
    labels = labels.to(similarity.device)
    sizes = labels.bincount().to(similarity.dtype)
    of_cluster = similarity.new_zeros(len(sizes), len(labels)).index_add_(0, labels, similarity)
    with_mean = of_cluster.gather(0, labels[None])[0] / sizes[labels]  # of each feature with its cluster's mean
    of_means = with_mean.new_zeros(len(sizes)).index_add_(0, labels, with_mean) / sizes
    variance = similarity.diagonal()
    lost = (variance - 2 * with_mean + of_means[labels]).view(num_models, -1).sum(1)
    total = variance.reshape(num_models, -1).sum(1)
    return torch.where(total > 0, lost / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)


def agreement(features: Tensor, merged: Tensor) -> Tensor:
    """Correlation of each feature of a source with each feature of the merged network, on the same samples.

    Args:
        features: of the source, ``(samples, C)``; or ``(samples, C, …)`` with positions, each of which counts.
        merged: of the merged network, ``(samples, W)`` or ``(samples, W, …)``.

    Returns:
        float64 ``(C, W)``; 0 for features that are constant.

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
        raise ValueError(f"`features` have {len(own)} samples and `merged` {len(other)}: give those of the same input.")
    joint = torch.cat([own, other], 1)
    centred = joint - joint.mean(0)
    return correlation(centred.T @ centred)[: own.shape[1], own.shape[1] :]


def by_chance(similarity: Tensor, labels: Tensor, num_models: int) -> tuple[float, float]:
    """Mean similarity inside clusters if each model's features were dealt out to the clusters at random.

    Args:
        similarity: of the features, ``(N·C, N·C)``.
        labels: int64 ``(N·C,)``, the cluster of each.
        num_models: N.

    Returns:
        Its expectation and its standard deviation over deals, with pairs taken as independent; NaN if no two features
        share a cluster.

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
    members = similarity.new_zeros(num_models, int(labels.max()) + 1)  # how many features of a model a cluster has
    members.scatter_add_(1, labels.view(num_models, size), torch.ones_like(own))
    pairs = members @ members.T - size * torch.eye(num_models).to(similarity)  # (N, N), each pair twice
    return float((pairs * mean).sum() / pairs.sum()), float((2 * (pairs * variance).sum()).sqrt() / pairs.sum())


def loss_barrier(losses: Sequence[float]) -> float:
    """Rise of the loss on the path between two networks above the mean of the two ends (Git Re-Basin, section 2).

    Args:
        losses: along the path, with its two ends.

    Returns:
        The highest loss minus the mean of the first and the last.

    Raises:
        ValueError: if there are fewer than two.

    Example:
        >>> loss_barrier([0.5, 2.0, 0.7])
        1.4
    """
    if len(losses) < 2:
        raise ValueError(f"`losses` must hold those of the two ends at least, got {len(losses)}.")
    return max(losses) - (losses[0] + losses[-1]) / 2


def fit_temperatures(
    logits: Mapping[str, Tensor], weights: Tensor | None = None, bounds: tuple[float, float] = (1e-3, 1e3)
) -> dict[str, float]:
    """Per head, a temperature T with which softmax(logits / T) can be compared with that of other heads.

    Every head is made equally confident on average, over samples to which N tasks contribute equally: as confident as a
    head of K classes would be that is certain of its own samples and undecided about all others, 1/N + (1 - 1/N) / K
    for the smallest K. Confidence, the highest probability, falls as T rises, so that T is found by halving.

    Args:
        logits: of each head on the same samples, ``(samples, classes)``; heads may have different numbers of classes.
        weights: how much each sample counts, ``(samples,)``, for tasks that are not equally frequent; all the same by
            default.
        bounds: the lowest and the highest temperature.

    Returns:
        A temperature by head; 1 for a head on which it has no influence.

    Raises:
        ValueError: if logits are not of that shape, there are no samples, or NaN or Inf is in them.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> found = fit_temperatures({"a": logits, "b": 3 * logits})
        >>> {task: round(found[task] / found["a"], 3) for task in found}
        {'a': 1.0, 'b': 3.0}
    """
    for task, output in logits.items():
        if output.ndim != 2 or not output.numel():
            raise ValueError(f"Head {task!r} needs logits (samples, classes) of some samples: got {(*output.shape,)}.")
        if not output.isfinite().all():
            raise ValueError(f"There is NaN or Inf in the logits of head {task!r}.")
    # A head of one class is certain whatever T is, and one head alone is compared with none.
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
