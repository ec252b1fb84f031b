"""Validation of similarity matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def check_square(matrix: Tensor, name: str) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"`{name}` must be a square matrix, got shape {tuple(matrix.shape)}.")


def check_finite(similarity: Tensor) -> None:
    if not torch.stack(torch.aminmax(similarity)).isfinite().all():  # aminmax returns NaN twice if there is any
        raise ValueError("`similarity` contains NaN or Inf. Pass a finite similarity matrix.")


def width_of(similarity: Tensor, num_models: int, width: int | None) -> int:
    """Return the number of clusters: ``width``, or by default the number of features of one model.

    Raises:
        ValueError: see :func:`check_matching`.
    """
    check_matching(similarity, num_models, 1 if width is None else width)
    return len(similarity) // num_models if width is None else width


def check_matching(similarity: Tensor, num_models: int, width: int = 1) -> None:
    """Check that a similarity matrix is square, and that ``num_models`` and ``width`` fit its size.

    Raises:
        ValueError: if they do not.
    """
    check_square(similarity, "similarity")
    if num_models < 1 or len(similarity) % num_models:
        raise ValueError(f"`num_models` must divide the {len(similarity)} features, got {num_models}.")
    if not 1 <= width <= len(similarity):
        raise ValueError(f"`width` must lie between 1 and {len(similarity)}, got {width}.")
