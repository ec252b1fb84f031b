"""Rules of operators on positions: pooling, resampling, padding, cumulative sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import nn

from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Rule, Trait, module_rule, rule, spellings
from lightning_zipit.graph.values import Features, Value

AXES = {1: "1d", 2: "2d", 3: "3d"}


def within(ctx: Context, input: Value, first: int) -> Value:
    """Combine entries along the axes from ``first`` on, which must be positions."""
    if not isinstance(input, Features):
        return ctx.constant([input])
    if any(axis >= first % input.rank for axis in input.axes):
        raise ctx.error("it treats an axis of features as positions")
    return input


def pool(ctx: Context, input: Value, axes: int, return_indices: bool) -> Any:
    """Pool positions along the last axes."""
    value = within(ctx, input, -axes)
    return (value, value) if return_indices else value  # indices are positions within each feature


def _pool_functions(axes: int) -> None:
    """Register the rules of pooling functions and modules with one to three axes."""
    size = AXES[axes]

    def max_pool(
        ctx: Context,
        input: Value,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        """Pool positions along the last axes."""
        return pool(ctx, input, axes, return_indices)

    def other_pool(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Any:
        """Pool positions along the last axes."""
        return pool(ctx, input, axes, return_indices=False)

    def adaptive_max_pool(ctx: Context, input: Value, output_size: Any, return_indices: bool = False) -> Any:
        """Pool positions along the last axes."""
        return pool(ctx, input, axes, return_indices)

    def module_pool(ctx: Context, module: nn.Module, input: Value) -> Any:
        """Pool positions along the last axes."""
        return pool(ctx, input, axes, getattr(module, "return_indices", False))

    modules = [getattr(nn, f"{kind}{size}") for kind in ("MaxPool", "AvgPool", "LPPool")]
    modules += [getattr(nn, f"Adaptive{kind}Pool{size}") for kind in ("Max", "Avg")]
    rules: dict[Rule, list[Any]] = {
        max_pool: spellings(f"max_pool{size}"),
        other_pool: spellings(f"avg_pool{size} lp_pool{size} adaptive_avg_pool{size}"),
        adaptive_max_pool: [getattr(F, f"adaptive_max_pool{size}")],
        module_pool: modules,
    }
    for function, operators in rules.items():
        rule(*operators, traits=Trait.POOLING)(function)


for _axes in AXES:
    _pool_functions(_axes)


@rule(F.interpolate, F.upsample, traits=Trait.POOLING)
def resample(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Value:
    """Resample positions along all axes after the channels."""
    return within(ctx, input, 2)


@module_rule(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, traits=Trait.POOLING)
def resample_module(ctx: Context, module: nn.Module, input: Value) -> Value:
    """Resample positions along all axes after the channels."""
    return resample(ctx, input)


@rule(F.pad)
def pad(ctx: Context, input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    """Pad positions. Padded channels are new constant features."""
    if not isinstance(input, Features):
        return ctx.constant([input])
    amounts = [tuple(pad[2 * (input.rank - 1 - axis) :][:2]) or (0, 0) for axis in input.axes]
    if not any(map(any, amounts)):
        return input
    (before, after), *others = amounts
    if others or before < 0 or after < 0 or mode != "constant":
        raise ctx.error("its padding of features is not supported; only constant padding along one axis is")
    return Features(np.concatenate([ctx.fresh(before), input.ids, ctx.fresh(after)]), input.axes)


@module_rule(
    *(
        getattr(nn, f"{kind}Pad{size}")
        for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")
        for size in AXES.values()
    ),
    traits=Trait.POOLING,
)
def pad_module(ctx: Context, module: nn.ZeroPad2d, input: Value) -> Value:
    """Pad positions."""
    return within(ctx, input, -len(module.padding) // 2)


@rule(*spellings("cumsum cumprod logcumsumexp"))
def running(ctx: Context, input: Value, dim: int, *, dtype: Any = None) -> Value:
    """Accumulate positions along one axis."""
    if isinstance(input, Features) and dim % input.rank in (0, *input.axes):
        raise ctx.error("it depends on the order of the features")
    return input if isinstance(input, Features) else ctx.constant([input])
