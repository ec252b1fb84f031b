"""What follows merging, on the same data."""

from lightning_zipit.refine.batch_norm import BatchNormEstimator
from lightning_zipit.refine.settings import NAMED, BatchNorm, LayerByLayer, LeastSquares, Refinement, Repair

__all__ = ["NAMED", "BatchNorm", "BatchNormEstimator", "LayerByLayer", "LeastSquares", "Refinement", "Repair"]
