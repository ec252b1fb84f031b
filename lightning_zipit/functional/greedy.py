"""The greedy matching of ZipIt!."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_zipit.functional.checks import check_finite, check_matching, width_of

ROWS_AT_ONCE = 64
"""Number of rows of a similarity matrix that fit into the processor's cache."""

OWN_MODEL_HANDICAP = 1e-6
"""Ratio by which similarities within a model are lowered, so that ties favor a partner in another model."""


def zip_features(
    similarity: Tensor, num_models: int, width: int | None = None, alpha: float = 0.1, beta: float = 1.0
) -> Tensor:
    """Match features by :func:`greedy_zip`, with dead features paired first and ties broken across models.

    Dead features have similarity 0 to all others, so a greedy search would keep them and merge live features instead.
    Therefore each cluster of dead features takes one dead feature of every model, as long as every model has one left.
    If ``width`` differs from the number of features of one model, all these dead features share one cluster if
    possible. Similarities are compared in float32. Similarities within a model are lowered by a millionth.

    Args:
        similarity: symmetric and finite similarity matrix, ``(n, n)``; the diagonal entry of a dead feature is 0.
        num_models: the number of models that the features come from.
        width: the number of clusters to return, 1 to n; by default the number of features of one model.
        alpha: see :func:`greedy_zip`.
        beta: see :func:`greedy_zip`.

    Returns:
        int64 labels ``(n,)`` on the CPU.

    Raises:
        ValueError: if an argument is out of range, or ``similarity`` is not square or not finite.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 1.0, 0.0],
        ...                            [0.0, 0.0, 0.0, 0.0]])
        >>> zip_features(similarity, num_models=2)
        tensor([0, 1, 0, 1])
    """
    width = width_of(similarity, num_models, width)
    size = len(similarity) // num_models
    dead = (similarity.diagonal() == 0).reshape(num_models, size)
    paired = int(dead.sum(1).min())
    aside = dead & (dead.cumsum(1) <= paired)
    live = (~aside).flatten().nonzero().flatten()
    # With a width of its own, dead features share one cluster if possible, and live features get the other clusters.
    spare = paired if width == size else max(width - len(live), min(paired, 1, width - 1))
    labels = torch.empty(len(similarity), dtype=torch.int64)
    if len(live):
        chosen = similarity if len(live) == len(similarity) else similarity[live][:, live]
        compared = chosen.to(torch.float32, copy=True)
        for own in range(num_models):
            block = slice(own * (size - paired), (own + 1) * (size - paired))
            compared[block, block].sub_(compared[block, block].abs(), alpha=OWN_MODEL_HANDICAP)
        labels[live.cpu()] = greedy_zip(compared, num_models, width - spare, alpha, beta)
    places = max(spare, 1)
    labels[aside.flatten().cpu()] = width - places + torch.arange(num_models * paired) % places
    return labels


def greedy_zip(similarity: Tensor, num_models: int, width: int, alpha: float = 0.1, beta: float = 1.0) -> Tensor:
    """Match features within and across models, the most similar pair first (ZipIt!, section 4.1 and appendix).

    The search starts with one cluster per feature. It merges the most similar allowed pair of clusters until ``width``
    clusters are left. Ties go to the lowest (row, column). The similarity of a merged cluster to any other cluster is
    ``alpha`` times the smaller similarity of its two parts. A merged cluster may merge with another only if both of its
    parts might have. The origin of a cluster is the model of its lowest feature.

    At most ``floor((n - width) // num_models * beta)`` merges may join two clusters of origin m. After that, no two
    clusters of origin m may merge. If no allowed pair is left before ``width`` is reached, every remaining pair is
    allowed from then on.

    Each row stores an upper bound of its highest similarity to a later row. A row is searched again only if its bound
    is the highest of all and out of date. This takes O(n²) operations in typical use; a search of the whole matrix at
    each merge would take O(n³).

    Args:
        similarity: symmetric and finite, ``(n, n)`` with ``n`` a multiple of ``num_models``; the diagonal is ignored.
        num_models: the number of models that the features come from.
        width: the number of clusters to return, 1 to n.
        alpha: factor of the similarity of a merged cluster, 0 to 1; low values favor pairs over large clusters.
        beta: ratio of each model's merges that may happen within the model, 0 to 1.

    Returns:
        int64 labels ``(n,)`` on the CPU: the cluster of each feature. Clusters are numbered by their lowest feature.

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
    check_finite(working)
    original = working.numpy()
    n = len(original)
    budget = np.full(num_models, math.floor((n - width) // num_models * beta))
    return torch.from_numpy(_GreedyZip(original, num_models, alpha, budget).run(width))


class _GreedyZip:
    """The state of one greedy matching. The lowest feature of a cluster identifies it, and is its row in ``pairs``."""

    def __init__(self, similarity: np.ndarray, num_models: int, alpha: float, budget: np.ndarray) -> None:
        self.similarity = similarity
        self.alpha = similarity.dtype.type(alpha)
        self.size = len(similarity)
        self.origin = np.repeat(np.arange(num_models), self.size // num_models)
        self.budget = budget
        self.alive = np.ones(self.size, dtype=bool)
        self.merges: list[tuple[int, int]] = []
        self.limited = True  # whether budgets and forbidden pairs apply
        self._start(similarity.copy())
        for model in np.flatnonzero(budget <= 0):
            self._forbid(int(model))

    def _start(self, pairs: np.ndarray) -> None:
        """Set the similarities. Pairs that may not merge have similarity -inf."""
        np.fill_diagonal(pairs, -np.inf)
        self.pairs = pairs
        self.gone = np.where(self.alive, 0, -np.inf).astype(pairs.dtype)
        # `bound`: an upper bound of each row's highest similarity to a later row
        self.bound = np.empty(self.size, dtype=pairs.dtype)
        self.best = np.empty(self.size, dtype=np.int64)  # column of that similarity, -1 if the row must be searched
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
        later = self.pairs[row, row + 1 :] + self.gone[row + 1 :]  # not empty: the last row is never searched
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
        # `alpha` raises a negative similarity, so `row` may become the best partner of an earlier row.
        earlier = np.flatnonzero((merged[:row] >= self.bound[:row]) & self.alive[:row])
        self.bound[earlier], self.best[earlier] = merged[earlier], -1
        if self.limited and self.origin[row] == self.origin[column]:
            model = self.origin[row]
            self.budget[model] -= 1
            if self.budget[model] <= 0:
                self._forbid(model)

    def _forbid(self, model: int) -> None:
        """Forbid further merges of two clusters of origin ``model``."""
        members = np.flatnonzero(self.alive & (self.origin == model))
        self.pairs[np.ix_(members, members)] = -np.inf
        self.best[members] = -1

    def _allow_all(self) -> None:
        """Allow every remaining pair: recompute the similarities without forbidden pairs."""
        self.limited = False
        pairs = self.similarity.copy()
        for row, column in self.merges:
            _join(pairs[row], pairs[column], self.alpha)
            pairs[:, row] = pairs[row]
        self._start(pairs)

    def _labels(self) -> np.ndarray:
        parent = np.arange(self.size)
        for row, column in reversed(self.merges):  # in reverse, so that the parent of a row is already final
            parent[column] = parent[row]
        return np.unique(parent, return_inverse=True)[1].astype(np.int64)


def _join(row: np.ndarray, other: np.ndarray, alpha: np.floating) -> None:
    """Write the similarities of two merged clusters into ``row``. -inf stays -inf, even with alpha = 0."""
    np.minimum(row, other, out=row)
    if alpha:
        np.multiply(row, alpha, out=row)
    else:
        row[row != -np.inf] = 0
