"""Matchings of features from similarities: assignment, clustering, averaging."""

from __future__ import annotations

from typing import Literal

import networkx as nx
import numpy as np
import torch
from scipy.cluster import hierarchy
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform
from torch import Tensor

from lightning_zipit.functional.checks import check_finite, check_matching, width_of

Linkage = Literal["average", "complete", "single"]


def average(num_features: int, num_models: int) -> Tensor:
    """Match features by index, so that merging averages the weights.

    Args:
        num_features: the number of features of all models together, a multiple of ``num_models``.
        num_models: the number of models that the features come from.

    Returns:
        int64 labels ``(num_features,)``.

    Raises:
        ValueError: if ``num_features`` is not a multiple of ``num_models``.

    Example:
        >>> average(6, num_models=2)
        tensor([0, 1, 2, 0, 1, 2])
    """
    if num_models < 1 or num_features % num_models:
        raise ValueError(f"`num_models` must divide the {num_features} features, got {num_models}.")
    return torch.arange(num_features // num_models).repeat(num_models)


def permute(similarity: Tensor, num_models: int) -> Tensor:
    """Match each model to the first, one to one, so that the total similarity is maximal.

    This is the assignment problem of Git Re-Basin (arXiv 2209.04836, section 3.1). Scipy solves it exactly.

    Args:
        similarity: symmetric and finite, ``(n, n)`` with ``n`` a multiple of ``num_models``.
        num_models: the number of models that the features come from.

    Returns:
        int64 labels ``(n,)`` on the CPU, with ``n / num_models`` clusters.

    Raises:
        ValueError: if ``similarity`` is not square or not finite, or its size is not a multiple of ``num_models``.

    Example:
        >>> permute(torch.tensor([[1.0, 0.1, 0.2, 0.9], [0.1, 1.0, 0.8, 0.3], [0.2, 0.8, 1.0, 0.0],
        ...                       [0.9, 0.3, 0.0, 1.0]]), num_models=2)
        tensor([0, 1, 1, 0])
    """
    check_matching(similarity, num_models)
    check_finite(similarity)
    width = len(similarity) // num_models
    labels = [torch.arange(width)]
    for model in range(1, num_models):
        block = similarity[:width, model * width : (model + 1) * width].detach().double().cpu().numpy()
        first, own = linear_sum_assignment(block, maximize=True)
        matched = torch.empty(width, dtype=torch.int64)
        matched[torch.from_numpy(own)] = torch.from_numpy(first)
        labels.append(matched)
    return torch.cat(labels)


def cycle_consistent(similarity: Tensor, num_models: int, rounds: int = 100) -> Tensor:
    """Match all models to each other, one to one, so that the total similarity over all pairs is high.

    Every model is matched to a common order. The composition of the matchings along any cycle of models is therefore
    the identity (C²M³, arXiv 2405.17897, section 3). The search starts from :func:`permute`. It matches each model in
    turn to the sum of all others in the common order, exactly, until nothing changes. The total similarity grows with
    every step, up to a local maximum.

    Args:
        similarity: symmetric and finite, ``(n, n)`` with ``n`` a multiple of ``num_models``.
        num_models: the number of models that the features come from.
        rounds: the maximum number of rounds over all models.

    Returns:
        int64 labels ``(n,)`` on the CPU, with ``n / num_models`` clusters. The first model's features are in order.

    Raises:
        ValueError: if ``similarity`` is not square or not finite, or its size is not a multiple of ``num_models``.

    Example:
        >>> cycle_consistent(torch.tensor([[1.0, 0.1, 0.2, 0.9], [0.1, 1.0, 0.8, 0.3], [0.2, 0.8, 1.0, 0.0],
        ...                                [0.9, 0.3, 0.0, 1.0]]), num_models=2)
        tensor([0, 1, 1, 0])
    """
    labels = permute(similarity, num_models).reshape(num_models, -1).numpy()
    width = labels.shape[1]
    blocks = similarity.detach().double().cpu().numpy().reshape(num_models, width, num_models, width)
    for _ in range(rounds):
        changed = False
        for model in range(1, num_models):
            others = [other for other in range(num_models) if other != model]
            gain = np.sum([blocks[model][:, other, labels[other].argsort()] for other in others], axis=0)  # (C, merged)
            best = linear_sum_assignment(gain, maximize=True)[1]
            if gain[range(width), best].sum() > gain[range(width), labels[model]].sum() + 1e-9 * width:
                labels[model], changed = best, True
        if not changed:
            break
    return torch.from_numpy(labels.flatten())


def optimal(similarity: Tensor, num_models: int) -> Tensor:
    """Pair the features of two models, within or across models, so that the total similarity is maximal.

    Greedy zipping approximates this matching (ZipIt!, appendix). Edmonds' blossom algorithm in networkx computes it. It
    takes O(n³) operations in Python, which is minutes for n ≥ 512.

    Args:
        similarity: symmetric and finite, ``(n, n)`` with ``n`` even; the diagonal is ignored.
        num_models: the number of models that the features come from; must be 2.

    Returns:
        int64 labels ``(n,)`` on the CPU, with n / 2 clusters of two features, numbered by their lowest feature.

    Raises:
        ValueError: if ``num_models`` is not 2, or ``similarity`` is not square or not finite.

    Example:
        >>> optimal(torch.tensor([[1.0, 0.9, 0.8, 0.0], [0.9, 1.0, 0.0, 0.7], [0.8, 0.0, 1.0, 0.1],
        ...                       [0.0, 0.7, 0.1, 1.0]]), num_models=2)
        tensor([0, 1, 0, 1])
    """
    check_matching(similarity, num_models)
    if num_models != 2:
        raise ValueError(
            f"`optimal` pairs the features of 2 models, got num_models={num_models}. Use `greedy_zip`, which makes "
            "larger clusters."
        )
    check_finite(similarity)
    weights = similarity.detach().double().cpu().numpy()
    weights = weights - weights.min() + 1  # networkx reads 0 as no edge; the shift adds the same to all pairings
    np.fill_diagonal(weights, 0)
    graph = nx.from_numpy_array(weights)
    partner = np.arange(len(similarity))
    for first, second in nx.max_weight_matching(graph, maxcardinality=True):
        partner[first], partner[second] = second, first
    lowest = np.minimum(partner, np.arange(len(similarity)))
    return torch.from_numpy(np.unique(lowest, return_inverse=True)[1].astype(np.int64))


def agglomerative(
    similarity: Tensor, num_models: int, linkage: Linkage = "average", width: int | None = None
) -> Tensor:
    """Cluster features by agglomerative clustering, the most similar clusters first.

    Args:
        similarity: symmetric and finite, ``(n, n)`` with ``n`` a multiple of ``num_models``; the diagonal is ignored.
        num_models: the number of models that the features come from.
        linkage: the similarity of two clusters: the mean over their pairs of features (``"average"``), the lowest
            (``"complete"``) or the highest (``"single"``).
        width: the number of clusters to return, 1 to n; by default the number of features of one model.

    Returns:
        int64 labels ``(n,)`` on the CPU, with ``width`` clusters, numbered by their lowest feature.

    Raises:
        ValueError: if ``similarity`` is not square or not finite, or its size is not a multiple of ``num_models``.

    Example:
        >>> agglomerative(torch.tensor([[1.0, 0.1, 0.2, 0.9], [0.1, 1.0, 0.8, 0.3], [0.2, 0.8, 1.0, 0.0],
        ...                             [0.9, 0.3, 0.0, 1.0]]), num_models=2)
        tensor([0, 1, 1, 0])
    """
    width = width_of(similarity, num_models, width)
    check_finite(similarity)
    values = similarity.detach().double().cpu().numpy()
    if len(values) == 1:
        return torch.zeros(1, dtype=torch.int64)
    distance = values.max() - values
    np.fill_diagonal(distance, 0)
    tree = hierarchy.linkage(squareform(distance, checks=False), linkage)
    return by_lowest(torch.from_numpy(hierarchy.cut_tree(tree, width)[:, 0].astype(np.int64)))


def kmeans(similarity: Tensor, num_models: int, rounds: int = 100, seed: int = 0, width: int | None = None) -> Tensor:
    """Cluster features by k-means (ZipIt!, appendix).

    Features are points whose inner products are the similarities: the rows of the square root of the matrix, without
    its negative eigenvalues. An empty cluster takes the point that is farthest from its own center, so that the result
    always has ``width`` clusters. (``scipy.cluster.vq.kmeans2`` leaves clusters empty if points coincide.)

    Args:
        similarity: symmetric and finite, ``(n, n)`` with ``n`` a multiple of ``num_models``.
        num_models: the number of models that the features come from.
        rounds: the maximum number of iterations.
        seed: random seed of the initial centers (k-means++).
        width: the number of clusters to return, 1 to n; by default the number of features of one model.

    Returns:
        int64 labels ``(n,)`` on the CPU, with ``width`` clusters, numbered by their lowest feature.

    Raises:
        ValueError: if ``similarity`` is not square or not finite, or its size is not a multiple of ``num_models``.

    Example:
        >>> kmeans(torch.tensor([[1.0, 0.1, 0.2, 0.9], [0.1, 1.0, 0.8, 0.3], [0.2, 0.8, 1.0, 0.0],
        ...                      [0.9, 0.3, 0.0, 1.0]]), num_models=2)
        tensor([0, 1, 1, 0])
    """
    width = width_of(similarity, num_models, width)
    check_finite(similarity)
    values, vectors = torch.linalg.eigh(similarity.detach().double().cpu())
    points = vectors * values.clamp(min=0).sqrt()
    centres = points[_spread(points, width, torch.Generator().manual_seed(seed))]
    labels = torch.full((len(points),), -1)
    for _ in range(rounds):
        before = labels
        distances, labels = torch.cdist(points, centres).min(1)
        counts = labels.bincount(minlength=width)
        for empty in (counts == 0).nonzero().flatten():
            farthest = distances.where(counts[labels] > 1, -torch.ones_like(distances)).argmax()
            counts[labels[farthest]] -= 1
            labels[farthest], distances[farthest], counts[empty] = empty, 0, 1
        if torch.equal(before, labels):
            break
        centres = torch.zeros_like(centres).index_add_(0, labels, points) / counts[:, None]
    return by_lowest(labels)


def _spread(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw indices of initial centers by k-means++ (Arthur and Vassilvitskii 2007)."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    nearest = (points - points[chosen[0]]).square().sum(1)
    for _ in range(count - 1):
        chances = nearest.clone()
        chances[chosen] = 0
        if not chances.any():  # all other points coincide with chosen ones
            chances = torch.ones_like(nearest)
            chances[chosen] = 0
        chosen.append(int(chances.multinomial(1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)


def by_lowest(labels: Tensor) -> Tensor:
    """Renumber clusters by their lowest feature."""
    count = int(labels.max()) + 1
    first = torch.full((count,), len(labels)).scatter_reduce_(0, labels, torch.arange(len(labels)), "amin")
    return first.argsort().argsort()[labels]


def unit_similarity(similarity: Tensor, members: Tensor, num_models: int) -> Tensor:
    """Compute the similarity of units of features, such as attention heads.

    The similarity of two units is the mean similarity of the best one-to-one matching of their features.

    Args:
        similarity: the similarity of the features of all models in one space, ``(N·C, N·C)``.
        members: the features of each unit of one model, ``(G, d)`` with G·d = C.
        num_models: N.

    Returns:
        float64 ``(N·G, N·G)``, symmetric.

    Raises:
        ValueError: if ``similarity`` does not fit ``members`` and ``num_models``.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.1, 0.2, 0.9], [0.1, 1.0, 0.8, 0.3], [0.2, 0.8, 1.0, 0.0],
        ...                            [0.9, 0.3, 0.0, 1.0]])
        >>> unit_similarity(similarity, torch.tensor([[0, 1]]), num_models=2)
        tensor([[1.0000, 0.8500],
                [0.8500, 1.0000]], dtype=torch.float64)
    """
    check_matching(similarity, num_models)
    units, size = members.shape
    if num_models * units * size != len(similarity):
        raise ValueError(
            f"`members` lists {units}·{size} features, but `similarity` has {len(similarity) // num_models} features "
            "per model. Pass the features of one model."
        )
    order = torch.cat([members.flatten() + model * units * size for model in range(num_models)])
    ordered = similarity.detach().double().cpu()[order][:, order].numpy()
    blocks = ordered.reshape(num_models * units, size, num_models * units, size).swapaxes(1, 2)
    result = np.empty(blocks.shape[:2])
    for first in range(len(blocks)):
        for second in range(first, len(blocks)):
            rows, columns = linear_sum_assignment(blocks[first, second], maximize=True)
            result[first, second] = result[second, first] = blocks[first, second][rows, columns].mean()
    return torch.from_numpy(result)
