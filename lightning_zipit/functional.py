"""The mathematics of merging, as pure functions: tensor in, tensor out.

Features of N models with C features each are numbered side by side: feature ``c`` of model ``m`` is ``m * C + c``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import networkx as nx
import numpy as np
import torch
from scipy.cluster import hierarchy
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform
from torch import Tensor

__all__ = [
    "agglomerative",
    "agreement",
    "average",
    "correlation",
    "cycle_consistent",
    "fit_temperatures",
    "greedy_zip",
    "kmeans",
    "loss_barrier",
    "merge_matrices",
    "merge_shares",
    "optimal",
    "permute",
    "ties",
]

Linkage = Literal["average", "complete", "single"]

ROWS_AT_ONCE = 64
"""Rows of a matrix of similarities that stay in the processor's cache."""


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
    _check_square(covariance, "covariance")
    variance = covariance.diagonal()
    alive = variance > 0
    inverse_deviation = torch.where(alive, variance.where(alive, torch.ones_like(variance)).rsqrt(), 0.0)
    scaled = covariance * inverse_deviation[:, None]
    scaled.mul_(inverse_deviation[None, :]).clamp_(-1.0, 1.0)
    scaled.diagonal().copy_(alive.to(scaled.dtype))
    return scaled


def greedy_zip(similarity: Tensor, num_models: int, width: int, alpha: float = 0.1, beta: float = 1.0) -> Tensor:
    """Match features within and across models, the most similar pair first (ZipIt!, section 4.1 and appendix).

    Starts with one cluster per feature and merges the most similar allowed pair until ``width`` clusters are left.
    Ties go to the lowest (row, column). A merged cluster's similarity to any other is ``alpha`` times the smaller of
    its two parts', and the two may merge only where both parts might have. A cluster originates in the model of its
    lowest-numbered feature. Model m has ``floor((n - width) // num_models * beta)`` merges of two clusters that both
    originate in m, after which no two clusters of origin m may merge. Where no allowed pair is left before ``width``
    is reached, every remaining pair is allowed from then on.

    Each row remembers an upper bound of its best similarity to a later row, and is searched again only when that
    bound is the highest of all and out of date: O(n²) operations in typical use, against O(n³) for a search of the
    whole matrix at each merge.

    Args:
        similarity: symmetric and finite, ``(n, n)`` with ``n`` a multiple of ``num_models``; the diagonal is ignored.
        num_models: how many models the features come from.
        width: how many clusters to leave, 1 to n.
        alpha: what the similarity of a merged cluster is multiplied with, 0 to 1; low values favour pairs over
            large clusters.
        beta: the share of each model's merges that may happen inside the model, 0 to 1.

    Returns:
        int64 labels ``(n,)`` on the CPU: the cluster of each feature, clusters numbered by their lowest feature.

    Raises:
        ValueError: if an argument is out of range, or ``similarity`` is not square or not finite.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.1, 0.2, 0.9], [0.1, 1.0, 0.8, 0.3], [0.2, 0.8, 1.0, 0.0],
        ...                            [0.9, 0.3, 0.0, 1.0]])
        >>> greedy_zip(similarity, num_models=2, width=2)
        tensor([0, 1, 1, 0])
    """
    check_matching(similarity, num_models, width)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"`alpha` must lie between 0 and 1, got {alpha}.")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"`beta` must lie between 0 and 1, got {beta}.")
    working = similarity.detach().cpu()
    if working.dtype not in (torch.float32, torch.float64):
        working = working.float()
    _check_finite(working)
    original = working.numpy()
    n = len(original)
    budget = np.full(num_models, math.floor((n - width) // num_models * beta))
    return torch.from_numpy(_GreedyZip(original, num_models, alpha, budget).run(width))


class _GreedyZip:
    """The state of one greedy matching; a cluster is known by its lowest feature, its row in ``pairs``."""

    def __init__(self, similarity: np.ndarray, num_models: int, alpha: float, budget: np.ndarray) -> None:
        self.similarity = similarity
        self.alpha = similarity.dtype.type(alpha)
        self.size = len(similarity)
        self.origin = np.repeat(np.arange(num_models), self.size // num_models)
        self.budget = budget
        self.alive = np.ones(self.size, dtype=bool)
        self.merges: list[tuple[int, int]] = []
        self.limited = True  # while budgets and forbidden pairs hold
        self._start(similarity.copy())
        for model in np.flatnonzero(budget <= 0):
            self._forbid(int(model))

    def _start(self, pairs: np.ndarray) -> None:
        """Take ``pairs`` as the similarities; a pair that may not merge is -inf."""
        np.fill_diagonal(pairs, -np.inf)
        self.pairs = pairs
        self.gone = np.where(self.alive, 0, -np.inf).astype(pairs.dtype)
        self.bound = np.empty(self.size, dtype=pairs.dtype)  # of each row's best similarity to a later row
        self.best = np.empty(self.size, dtype=np.int64)  # the column that gives it, -1 where a search is due
        earlier = np.tri(ROWS_AT_ONCE, dtype=bool)
        for first in range(0, self.size, ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            later = pairs[rows, first:] + self.gone[first:]
            later[:, :ROWS_AT_ONCE][earlier[: len(later), : later.shape[1]]] = -np.inf
            column = later.argmax(1)
            self.bound[rows], self.best[rows] = later[np.arange(len(later)), column], first + column
        self.bound[~self.alive] = -np.inf

    def run(self, width: int) -> np.ndarray:
        clusters = self.size
        while clusters > width:
            row, column = self._most_similar()
            self._merge(row, column)
            clusters -= 1
        return self._labels()

    def _most_similar(self) -> tuple[int, int]:
        while True:
            row = int(self.bound.argmax())
            if self.bound[row] == -np.inf:
                self._allow_all()
            elif self.best[row] >= 0:
                return row, int(self.best[row])
            else:
                self._search(row)

    def _search(self, row: int) -> None:
        later = self.pairs[row, row + 1 :] + self.gone[row + 1 :]  # never of the last row, which has no later one
        column = int(later.argmax())
        self.bound[row], self.best[row] = later[column], row + 1 + column

    def _merge(self, row: int, column: int) -> None:
        merged = self.pairs[row]
        _join(merged, self.pairs[column], self.alpha)
        merged[row] = -np.inf
        self.pairs[:, row] = merged
        self.merges.append((row, column))
        self.alive[column] = False
        self.gone[column] = self.bound[column] = -np.inf
        self.best[(self.best == row) | (self.best == column)] = -1
        self.best[row], self.bound[row] = -1, np.inf
        # A negative similarity grows when alpha scales it, so that earlier rows may find a better partner in `row`.
        earlier = np.flatnonzero((merged[:row] >= self.bound[:row]) & self.alive[:row])
        self.bound[earlier], self.best[earlier] = merged[earlier], -1
        if self.limited and self.origin[row] == self.origin[column]:
            model = self.origin[row]
            self.budget[model] -= 1
            if self.budget[model] <= 0:
                self._forbid(model)

    def _forbid(self, model: int) -> None:
        """No two clusters that originate in ``model`` may merge any more."""
        members = np.flatnonzero(self.alive & (self.origin == model))
        self.pairs[np.ix_(members, members)] = -np.inf
        self.best[members] = -1

    def _allow_all(self) -> None:
        """Every remaining pair is allowed: the similarities as they would be had nothing been forbidden."""
        self.limited = False
        pairs = self.similarity.copy()
        for row, column in self.merges:
            _join(pairs[row], pairs[column], self.alpha)
            pairs[:, row] = pairs[row]
        self._start(pairs)

    def _labels(self) -> np.ndarray:
        parent = np.arange(self.size)
        for row, column in reversed(self.merges):  # the last merges first: a row's own parent is then final
            parent[column] = parent[row]
        return np.unique(parent, return_inverse=True)[1].astype(np.int64)


def _join(row: np.ndarray, other: np.ndarray, alpha: np.floating) -> None:
    """The similarities of two merged clusters, in place of the first's; alpha = 0 keeps -inf forbidden."""
    np.minimum(row, other, out=row)
    if alpha:
        np.multiply(row, alpha, out=row)
    else:
        row[row != -np.inf] = 0


def permute(similarity: Tensor, num_models: int) -> Tensor:
    """Match each model to the first, one feature to one, so that the total similarity is the highest.

    The assignment problem of Git Re-Basin (arXiv 2209.04836, section 3.1), solved exactly by scipy.

    Args:
        similarity: symmetric and finite, ``(n, n)`` with ``n`` a multiple of ``num_models``.
        num_models: how many models the features come from.

    Returns:
        int64 labels ``(n,)`` on the CPU, with ``n / num_models`` clusters.

    Raises:
        ValueError: if ``similarity`` is not square, or its size not a multiple of ``num_models``.

    Example:
        >>> permute(torch.tensor([[1.0, 0.1, 0.2, 0.9], [0.1, 1.0, 0.8, 0.3], [0.2, 0.8, 1.0, 0.0],
        ...                       [0.9, 0.3, 0.0, 1.0]]), num_models=2)
        tensor([0, 1, 1, 0])
    """
    check_matching(similarity, num_models)
    _check_finite(similarity)
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
    """Match all models to each other, one feature to one, so that the total similarity over all pairs is high.

    Every model is matched to a common order, so that going from model to model and back ends where it began (C²M³,
    arXiv 2405.17897, section 3). Starting from :func:`permute`, each model in turn is matched to the sum of all others
    in that order, exactly, until nothing changes: the total grows with every step, up to a local maximum.

    Args:
        similarity: symmetric and finite, ``(n, n)`` with ``n`` a multiple of ``num_models``.
        num_models: how many models the features come from.
        rounds: how often every model is matched anew, at most.

    Returns:
        int64 labels ``(n,)`` on the CPU, with ``n / num_models`` clusters; the first model's features are in order.

    Raises:
        ValueError: if ``similarity`` is not square or not finite, or its size not a multiple of ``num_models``.

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


def agglomerative(
    similarity: Tensor, num_models: int, linkage: Linkage = "average", width: int | None = None
) -> Tensor:
    """Cluster features bottom up, the most similar clusters first.

    Args:
        similarity: symmetric and finite, ``(n, n)`` with ``n`` a multiple of ``num_models``; the diagonal is ignored.
        num_models: how many models the features come from.
        linkage: the similarity of two clusters: the mean over their pairs, the lowest (``"complete"``) or the highest
            (``"single"``).
        width: how many clusters to leave, 1 to n; as many as one model has features by default.

    Returns:
        int64 labels ``(n,)`` on the CPU, with ``width`` clusters, numbered by their lowest feature.

    Raises:
        ValueError: if ``similarity`` is not square or not finite, or its size not a multiple of ``num_models``.

    Example:
        >>> agglomerative(torch.tensor([[1.0, 0.1, 0.2, 0.9], [0.1, 1.0, 0.8, 0.3], [0.2, 0.8, 1.0, 0.0],
        ...                             [0.9, 0.3, 0.0, 1.0]]), num_models=2)
        tensor([0, 1, 1, 0])
    """
    width = width_of(similarity, num_models, width)
    _check_finite(similarity)
    values = similarity.detach().double().cpu().numpy()
    if len(values) == 1:
        return torch.zeros(1, dtype=torch.int64)
    distance = values.max() - values
    np.fill_diagonal(distance, 0)
    tree = hierarchy.linkage(squareform(distance, checks=False), linkage)
    return by_lowest(torch.from_numpy(hierarchy.cut_tree(tree, width)[:, 0].astype(np.int64)))


def by_lowest(labels: Tensor) -> Tensor:
    """The same clusters, numbered by their lowest feature."""
    count = int(labels.max()) + 1
    first = torch.full((count,), len(labels)).scatter_reduce_(0, labels, torch.arange(len(labels)), "amin")
    return first.argsort().argsort()[labels]


def optimal(similarity: Tensor, num_models: int) -> Tensor:
    """Pair the features of two models up, within or across them, so that the total similarity is the highest.

    The matching that greedy zipping approximates (ZipIt!, appendix), by Edmonds' blossom algorithm as networkx has it:
    O(n³) operations in Python, which is minutes from n = 512 on.

    Args:
        similarity: symmetric and finite, ``(n, n)`` with ``n`` even; the diagonal is ignored.
        num_models: how many models the features come from, 2.

    Returns:
        int64 labels ``(n,)`` on the CPU, with n / 2 clusters of two features, numbered by their lowest feature.

    Raises:
        ValueError: if there are more or fewer models than 2, or ``similarity`` is not square or not finite.

    Example:
        >>> optimal(torch.tensor([[1.0, 0.9, 0.8, 0.0], [0.9, 1.0, 0.0, 0.7], [0.8, 0.0, 1.0, 0.1],
        ...                       [0.0, 0.7, 0.1, 1.0]]), num_models=2)
        tensor([0, 1, 0, 1])
    """
    check_matching(similarity, num_models)
    if num_models != 2:
        raise ValueError(f"Pairs are for 2 models, got {num_models}: use greedy_zip, which makes larger clusters.")
    _check_finite(similarity)
    weights = similarity.detach().double().cpu().numpy()
    weights = weights - weights.min() + 1  # networkx takes 0 for no edge; all pairings grow by the same
    np.fill_diagonal(weights, 0)
    graph = nx.from_numpy_array(weights)
    partner = np.arange(len(similarity))
    for first, second in nx.max_weight_matching(graph, maxcardinality=True):
        partner[first], partner[second] = second, first
    lowest = np.minimum(partner, np.arange(len(similarity)))
    return torch.from_numpy(np.unique(lowest, return_inverse=True)[1].astype(np.int64))


def kmeans(similarity: Tensor, num_models: int, rounds: int = 100, seed: int = 0, width: int | None = None) -> Tensor:
    """Cluster features by k-means (ZipIt!, appendix).

    Features are points whose inner products are the similarities: the square root of the matrix, its negative
    eigenvalues left out. A cluster that runs empty takes the point that lies farthest from its own centre.

    Args:
        similarity: symmetric and finite, ``(n, n)`` with ``n`` a multiple of ``num_models``.
        num_models: how many models the features come from.
        rounds: of assigning points and moving centres, at most.
        seed: of the centres to start from (k-means++).
        width: how many clusters to make, 1 to n; as many as one model has features by default.

    Returns:
        int64 labels ``(n,)`` on the CPU, with ``width`` clusters, numbered by their lowest feature.

    Raises:
        ValueError: if ``similarity`` is not square or not finite, or its size not a multiple of ``num_models``.

    Example:
        >>> kmeans(torch.tensor([[1.0, 0.1, 0.2, 0.9], [0.1, 1.0, 0.8, 0.3], [0.2, 0.8, 1.0, 0.0],
        ...                      [0.9, 0.3, 0.0, 1.0]]), num_models=2)
        tensor([0, 1, 1, 0])
    """
    width = width_of(similarity, num_models, width)
    _check_finite(similarity)
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
    """Indices of points that lie apart from each other, drawn as k-means++ does (Arthur and Vassilvitskii 2007)."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    nearest = (points - points[chosen[0]]).square().sum(1)
    for _ in range(count - 1):
        chances = nearest.clone()
        chances[chosen] = 0
        if not chances.any():  # all others are copies of those chosen
            chances = torch.ones_like(nearest)
            chances[chosen] = 0
        chosen.append(int(chances.multinomial(1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)


def unit_similarity(similarity: Tensor, members: Tensor, num_models: int) -> Tensor:
    """How alike units of features are, such as the heads of attention: the mean similarity of their best matching.

    Args:
        similarity: of the features of a space, models side by side, ``(N·C, N·C)``.
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
            f"`members` are {units}·{size} features, but `similarity` holds {len(similarity) // num_models} a model."
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


def ties(vectors: Tensor, density: float) -> Tensor:
    """Combine changes of weights: trim, elect a sign, average those that have it (TIES-Merging, arXiv 2306.01708).

    Args:
        vectors: ``(N, P)``, the changes of P weights in each of N models.
        density: the share of each model's changes that is kept, the largest; above 0 to 1.

    Returns:
        ``(P,)``; 0 where all changes are trimmed or cancel.

    Raises:
        ValueError: if ``density`` is out of range, or ``vectors`` is no matrix.

    Example:
        >>> ties(torch.tensor([[3.0, -2.0, 0.1], [1.0, 4.0, -0.2]]), density=0.6)
        tensor([2., 4., 0.])
    """
    if vectors.ndim != 2:
        raise ValueError(f"`vectors` must be a matrix, got shape {tuple(vectors.shape)}.")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"`density` must lie above 0 and not above 1, got {density}.")
    size = vectors.shape[1]
    trimmed = max(size - math.ceil(density * size), 0)
    kept = vectors.clone()
    if trimmed:
        threshold = vectors.abs().kthvalue(trimmed, dim=1, keepdim=True).values
        kept[vectors.abs() <= threshold] = 0
    sign = kept.sum(0).sign()
    agreeing = (kept.sign() == sign) & (kept != 0)
    return (kept * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def zip_loss(similarity: Tensor, labels: Tensor) -> float:
    """The share of the features' variance that is lost when every feature becomes the mean of its cluster.

    Features count as scaled to variance 1; what is kept is Σ over clusters of the mean of their similarities, times
    their size: the objective of k-means.

    Args:
        similarity: of the features, ``(n, n)``.
        labels: int64 ``(n,)``, the cluster of each.

    Returns:
        0 where nothing is merged, or only what is the same, up to 1.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.0, 0.8], [0.0, 1.0, 0.0], [0.8, 0.0, 1.0]])
        >>> round(zip_loss(similarity, torch.tensor([0, 1, 0])), 4)
        0.0667
    """
    return float(zip_losses(similarity, labels, 1).clamp(0, 1))


def zip_losses(similarity: Tensor, labels: Tensor, num_models: int) -> Tensor:
    """What each model loses of its features' variance when every feature becomes the mean of its cluster.

    Σ_i E(x_i - z_i)² / Σ_i E x_i² over the features of one model, with z_i the mean of the cluster of feature i: above
    1 where the clusters vary more than what they stand for. Weighted by the models' variances, the losses add up to
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
    """The correlation of each feature of a source with each feature of the merged network, on the same samples.

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
    """The mean similarity inside clusters if each model's features were dealt out to them at random.

    Args:
        similarity: of the features, ``(N·C, N·C)``.
        labels: int64 ``(N·C,)``, the cluster of each.
        num_models: N.

    Returns:
        Its expectation, and its deviation from one deal to another, which takes pairs for independent; NaN where no two
        features share a cluster.

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
    """How far the loss on the way from one network to another rises above that of the two (Git Re-Basin, section 2).

    Args:
        losses: along the way, its two ends included.

    Returns:
        The highest, less the mean of the first and the last.

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


def average(num_features: int, num_models: int) -> Tensor:
    """Match feature ``c`` of every model to feature ``c`` of the first: merging is then plain weight averaging.

    Args:
        num_features: of all models together, a multiple of ``num_models``.
        num_models: how many models the features come from.

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


def merge_matrices(
    labels: Tensor, num_models: int, weights: Sequence[float] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The merge and unmerge matrices of a matching (ZipIt!, section 4).

    Args:
        labels: int64 ``(n,)``, the merged feature that each source feature becomes.
        num_models: how many models the features come from.
        weights: how much each model counts in its clusters; see :func:`merge_shares`.

    Returns:
        The merge matrices M_i ``(W, C)``, which average each cluster: the rows of ``[M_1 … M_N]`` sum to 1; and the
        unmerge matrices U_i ``(C, W)``, which copy it back.

    Raises:
        ValueError: if ``labels`` is not an int64 vector whose length is a multiple of ``num_models``, or leaves out a
            number; or ``weights`` are not one per model, none negative and one positive.

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
        raise ValueError("`labels` must be int64, and use every number from 0 to their highest.")
    one_hot = torch.nn.functional.one_hot(labels).to(torch.get_default_dtype())  # (n, W)
    averaging = one_hot.T * merge_shares(labels, num_models, weights).to(one_hot)  # (W, n)
    return list(averaging.chunk(num_models, dim=1)), list(one_hot.chunk(num_models, dim=0))


def merge_shares(labels: Tensor, num_models: int, weights: Sequence[float] | None = None) -> Tensor:
    """What each feature contributes to the average of its cluster: the entries of ``[M_1 … M_N]``.

    Args:
        labels: int64 ``(n,)``, the merged feature that each source feature becomes.
        num_models: how many models the features come from.
        weights: how much each model counts; all the same by default, and in clusters of models that count nothing.

    Returns:
        float64 ``(n,)``; those of a cluster sum to 1.

    Raises:
        ValueError: if ``weights`` are not one per model, none negative and one positive.

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
    """Raise a ``ValueError`` unless weights are one per model, none negative and one positive."""
    numbers = all(isinstance(weight, (int, float)) and 0 <= weight < math.inf for weight in weights)
    if len(weights) != num_models or not numbers or not any(weights):
        raise ValueError(
            f"`weights` must be {num_models} numbers, one per model, none negative and at least one above 0; got "
            f"{list(weights)}."
        )


def _check_square(matrix: Tensor, name: str) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"`{name}` must be a square matrix, got shape {tuple(matrix.shape)}.")


def _check_finite(similarity: Tensor) -> None:
    if not torch.stack(torch.aminmax(similarity)).isfinite().all():  # NaN is both the lowest and the highest
        raise ValueError("`similarity` holds NaN or Inf; similarities must be finite.")


def width_of(similarity: Tensor, num_models: int, width: int | None) -> int:
    """The number of clusters that is asked for, that of one model's features by default; see :func:`check_matching`."""
    check_matching(similarity, num_models, 1 if width is None else width)
    return len(similarity) // num_models if width is None else width


def check_matching(similarity: Tensor, num_models: int, width: int = 1) -> None:
    """Raise ValueError unless a similarity matrix fits a number of models and a width."""
    _check_square(similarity, "similarity")
    if num_models < 1 or len(similarity) % num_models:
        raise ValueError(f"`num_models` must divide the {len(similarity)} features, got {num_models}.")
    if not 1 <= width <= len(similarity):
        raise ValueError(f"`width` must lie between 1 and {len(similarity)}, got {width}.")
