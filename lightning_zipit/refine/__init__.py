"""Refinements: adapt merged networks to the calibration data."""

from lightning_zipit._common.collectives import all_reduce_sums
from lightning_zipit.refine.batch_norm import BatchNorm, BatchNormEstimator
from lightning_zipit.refine.layer_by_layer import LayerByLayer
from lightning_zipit.refine.least_squares import LeastSquares
from lightning_zipit.refine.refinement import Changes, MergedNetworks, NormShift, Refinement, Refining
from lightning_zipit.refine.repair import Repair

NAMED: dict[str, Refinement] = {"batch_norm": BatchNorm(), "repair": Repair(), "least_squares": LeastSquares()}
"""Refinements with default settings, by the names that ``refine=`` accepts."""

__all__ = [
    "NAMED",
    "BatchNorm",
    "BatchNormEstimator",
    "Changes",
    "LayerByLayer",
    "LeastSquares",
    "MergedNetworks",
    "NormShift",
    "Refinement",
    "Refining",
    "Repair",
    "all_reduce_sums",
]
