"""What follows merging, on the same data."""

from lightning_zipit.refine.batch_norm import BatchNormEstimator

__all__ = ["BatchNormEstimator"]
