"""Samples that wait to be added to statistics together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_zipit._calibration.statistics import FeatureStatistics, empty_like_features


class Waiting:
    """Samples that are added to statistics together, once they are more than the features of a model.

    Args:
        statistics: what they are added to.
        features: the first of them, of each model ``(C_i, samples, …)``.
    """

    def __init__(self, statistics: FeatureStatistics, features: Sequence[Tensor]) -> None:
        self.statistics = statistics
        first = features[0].flatten(1)
        room = first[:, :1].expand(-1, statistics.few + first.shape[1])
        with torch.inference_mode(False):  # may then be written to in either mode
            self.rows = empty_like_features(sum(statistics.sizes), room, first.dtype)
        self.filled = 0

    def add(self, features: Sequence[Tensor]) -> None:
        """Copy samples of each model, ``(C_i, samples, …)``: no operator that works in place can change them here."""
        samples = features[0][0].numel()
        if self.filled + samples > self.rows.shape[1]:  # a batch larger than the first
            self.flush()
        if samples > self.rows.shape[1]:
            self.statistics.update(features, features_first=True)
            return
        free = self.rows[:, self.filled : self.filled + samples].unflatten(1, features[0].shape[1:])
        for part, feature in zip(free.split(self.statistics.sizes), features, strict=True):
            part.copy_(feature)
        self.filled += samples
        if self.filled > self.statistics.few:
            self.flush()

    def flush(self) -> None:
        """Add what waits."""
        if self.filled:
            self.statistics.consume(self.rows[:, : self.filled])
            self.filled = 0
