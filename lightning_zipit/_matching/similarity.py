"""Similarity of features from the moments of their activations."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_zipit import functional as F
from lightning_zipit._calibration.statistics import Moments

SimilarityKind = Literal["correlation", "absolute", "cosine", "covariance"]

SCALE_HANDICAP = 1e-6
ROWS_AT_ONCE = 1024


def similarity_from(moments: Moments, kind: SimilarityKind = "correlation") -> Tensor:
    """Compute the similarity of features. Reduce it by up to 10⁻⁶ for pairs of different scale.

    Features that are active on the same few samples have a correlation of 1. Only their scales distinguish them.

    Args:
        moments: the moments of the features, models side by side.
        kind: ``"correlation"``, ``"absolute"`` (the absolute value of the correlation), ``"cosine"`` (of uncentred
            activations), or ``"covariance"``.

    Returns:
        float64 ``(N·C, N·C)``.
    """
    if kind == "covariance":
        return moments.covariance
    scale = moments.covariance.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    if kind == "cosine":
        ratio = (moments.count - 1) / moments.count
        similarity = F.correlation(torch.addr(moments.covariance, moments.mean, moments.mean, beta=ratio))
    else:
        similarity = F.correlation(moments.covariance)
    if kind == "absolute":
        similarity.abs_()
    for rows, own in zip(similarity.split(ROWS_AT_ONCE), scale.split(ROWS_AT_ONCE), strict=True):
        ratios = own[:, None] / scale[None, :]
        ratios = torch.minimum(ratios, ratios.reciprocal())
        rows.mul_(ratios.sub_(1).mul_(SCALE_HANDICAP).add_(1))
    return similarity
