"""How far re-estimation moves batch norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class NormShift:
    """How far re-estimation moved the running statistics of a batch norm.

    Attributes:
        mean: distance of the means in standard deviations before; the mean over features.
        variance: ratio of the variances after to those before; the geometric mean over features. A ratio below 1 means
            that merging made features vary less (the variance collapse of REPAIR, arXiv 2211.08403).
    """

    mean: float
    variance: float


def measure_shifts(before: Mapping[str, nn.Module], after: Mapping[str, nn.Module]) -> dict[str, NormShift]:
    """Compare the running statistics of batch norms.

    Args:
        before: modules by name.
        after: the same modules with other statistics.

    Returns:
        By the names of module and norm, for norms with running statistics.
    """
    shifts = {}
    for prefix, module in before.items():
        for name, norm in module.named_modules():
            if not isinstance(norm, _BatchNorm) or not norm.track_running_stats:
                continue
            renewed = after[prefix].get_submodule(name)
            (mean, variance), (new_mean, new_variance) = (
                [each.get_buffer(key).double().cpu() for key in ("running_mean", "running_var")]
                for each in (norm, renewed)
            )
            variance, new_variance = variance + norm.eps, new_variance + norm.eps
            apart = (new_mean - mean).abs() / variance.sqrt()
            ratio = (new_variance / variance).log().mean().exp()
            shifts[f"{prefix}.{name}".rstrip(".")] = NormShift(float(apart.mean()), float(ratio))
    return shifts
