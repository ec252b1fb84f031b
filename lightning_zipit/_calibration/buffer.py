"""Buffer of samples that are added to statistics together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_zipit._calibration.statistics import FeatureStatistics, empty_like_features


class SampleBuffer:
    """Buffer of samples. It is flushed when it holds more samples than a model has features.

    Args:
        statistics: the statistics to which the samples are added.
        features: the first samples, of each model ``(C_i, samples, …)``. They determine layout and dtype.
    """

    def __init__(self, statistics: FeatureStatistics, features: Sequence[Tensor]) -> None:
        self.statistics = statistics
        first = features[0].flatten(1)
        room = first[:, :1].expand(-1, statistics.float64_limit + first.shape[1])
        with torch.inference_mode(False):  # so that it is writable inside and outside inference mode
            self.rows = empty_like_features(sum(statistics.sizes), room, first.dtype)
        self.filled = 0

    def add(self, features: Sequence[Tensor]) -> None:
        """Copy samples of each model, ``(C_i, samples, …)``, so that later in-place operators cannot change them."""
        samples = features[0][0].numel()
        if self.filled + samples > self.rows.shape[1]:  # the batch is larger than the first one
            self.flush()
        if samples > self.rows.shape[1]:
            self.statistics.update(features, features_first=True)
            return
        free = self.rows[:, self.filled : self.filled + samples].unflatten(1, features[0].shape[1:])
        for part, feature in zip(free.split(self.statistics.sizes), features, strict=True):
            part.copy_(feature)
        self.filled += samples
        if self.filled > self.statistics.float64_limit:
            self.flush()

    def flush(self) -> None:
        """Add the buffered samples to the statistics."""
        if self.filled:
            self.statistics.consume(self.rows[:, : self.filled])
            self.filled = 0
