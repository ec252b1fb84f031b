"""The mathematics of merging as pure functions of tensors.

The features of N models with C features each are concatenated: feature ``c`` of model ``m`` has index ``m * C + c``.
"""

from lightning_zipit.functional.alignment import align, canonical_correlations, mixed_similarity
from lightning_zipit.functional.greedy import greedy_zip, zip_features
from lightning_zipit.functional.matching import (
    agglomerative,
    average,
    cycle_consistent,
    kmeans,
    optimal,
    permute,
    unit_similarity,
)
from lightning_zipit.functional.matrices import merge_matrices, merge_shares, ties
from lightning_zipit.functional.measures import (
    agreement,
    by_chance,
    correlation,
    fit_temperatures,
    loss_barrier,
    zip_loss,
    zip_losses,
)

__all__ = [
    "agglomerative",
    "agreement",
    "align",
    "average",
    "by_chance",
    "canonical_correlations",
    "correlation",
    "cycle_consistent",
    "fit_temperatures",
    "greedy_zip",
    "kmeans",
    "loss_barrier",
    "merge_matrices",
    "merge_shares",
    "mixed_similarity",
    "optimal",
    "permute",
    "ties",
    "unit_similarity",
    "zip_features",
    "zip_loss",
    "zip_losses",
]
