"""Operators on the positions of each feature: pooling, resampling, padding, running sums."""

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
    """The operator combines entries along the axes from ``first`` on, which must be positions."""
    if not isinstance(input, Features):
        return ctx.constant([input])
    if any(axis >= first % input.rank for axis in input.axes):
        raise ctx.error("it takes the axis of the features for positions")
    return input


def pool(ctx: Context, input: Value, axes: int, return_indices: bool) -> Any:
    """Works along the last axes alone, whatever comes before them."""
    value = within(ctx, input, -axes)
    return (value, value) if return_indices else value  # where a feature's entries are is told feature by feature


def _pool_functions(axes: int) -> None:
    """The rules of the pooling functions and modules of one to three axes."""
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
        return pool(ctx, input, axes, return_indices)

    def other_pool(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Any:
        return pool(ctx, input, axes, return_indices=False)

    def adaptive_max_pool(ctx: Context, input: Value, output_size: Any, return_indices: bool = False) -> Any:
        return pool(ctx, input, axes, return_indices)

    def module_pool(ctx: Context, module: nn.Module, input: Value) -> Any:
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
    """All axes behind the channels are positions."""
    return within(ctx, input, 2)


@module_rule(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, traits=Trait.POOLING)
def resample_module(ctx: Context, module: nn.Module, input: Value) -> Value:
    return resample(ctx, input)


@rule(F.pad)
def pad(ctx: Context, input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    """Padded positions change nothing; padded channels are features of their own, the same number in every model."""
    if not isinstance(input, Features):
        return ctx.constant([input])
    amounts = [tuple(pad[2 * (input.rank - 1 - axis) :][:2]) or (0, 0) for axis in input.axes]
    if not any(map(any, amounts)):
        return input
    (before, after), *others = amounts
    if others or before < 0 or after < 0 or mode != "constant":
        raise ctx.error("it pads the features in a way that is not understood")
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
    return within(ctx, input, -len(module.padding) // 2)


@rule(*spellings("cumsum cumprod logcumsumexp"))
def running(ctx: Context, input: Value, dim: int, *, dtype: Any = None) -> Value:
    """Each entry from those before it along one axis."""
    if isinstance(input, Features) and dim % input.rank in (0, *input.axes):
        raise ctx.error("it depends on the order of the features")
    return input if isinstance(input, Features) else ctx.constant([input])
