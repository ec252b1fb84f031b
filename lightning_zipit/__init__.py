"""Merge trained LightningModules, each with its own task and initialisation, into one multi-head module.

The method is ZipIt! (arXiv 2305.03053). A few hundred samples give the correlation of the models' features. Correlated
features are matched, and matched features are averaged into one. Nothing is trained.
"""

from lightning_zipit import functional
from lightning_zipit._calibration.statistics import FeatureStatistics, Moments
from lightning_zipit._calibration.statistics_file import CalibrationStatistics
from lightning_zipit._lightning.callback import ZipItCallback
from lightning_zipit._lightning.cli import ZipItCLI
from lightning_zipit._lightning.distillation import Distillation
from lightning_zipit._lightning.driver import ZipIt
from lightning_zipit._lightning.export import export_merged
from lightning_zipit._lightning.module import ZipItModule
from lightning_zipit._lightning.multihead import MultiHeadModule
from lightning_zipit._lightning.multitask import Ensemble
from lightning_zipit._lightning.trainer import ZipItTrainer
from lightning_zipit._report.report import MergeReport
from lightning_zipit._sweep.plan import Range
from lightning_zipit._sweep.results import SweepResult
from lightning_zipit.graph import MergeGraph, register_rule, trace
from lightning_zipit.interpolation import interpolate
from lightning_zipit.metrics import JointAccuracy
from lightning_zipit.plain import merge_backbones
from lightning_zipit.settings import MergeSettings

__version__ = "0.1.0"

__all__ = [
    "CalibrationStatistics",
    "Distillation",
    "Ensemble",
    "FeatureStatistics",
    "JointAccuracy",
    "MergeGraph",
    "MergeReport",
    "MergeSettings",
    "Moments",
    "MultiHeadModule",
    "Range",
    "SweepResult",
    "ZipIt",
    "ZipItCLI",
    "ZipItCallback",
    "ZipItModule",
    "ZipItTrainer",
    "export_merged",
    "functional",
    "interpolate",
    "merge_backbones",
    "register_rule",
    "trace",
]
