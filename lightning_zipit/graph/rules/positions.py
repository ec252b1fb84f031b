"""Rules of operators on positions: pooling, resampling, padding, cumulative sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lightning_zipit.graph.align import by_channel
from lightning_zipit.graph.computed import with_axes
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Rule, Trait, module_rule, rule, spellings
from lightning_zipit.graph.values import Features, Parameter, Value

AXES = {1: "1d", 2: "2d", 3: "3d"}


def within(ctx: Context, input: Value, first: int) -> Value:
    """Combine entries along the axes from ``first`` on, which must be positions."""
    if isinstance(input, Features):
        return replace(by_channel(ctx, input, first), alike=())
    if isinstance(input, Parameter) and input.counts:
        rank = len(input.shape)
        shown = [axis if axis < (first if first >= 0 else first + rank) else None for axis in range(rank)]
        return with_axes(input, ctx.shapes[ctx.node.name], shown)
    return ctx.constant([input])


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
        return within(ctx, input, -len(pad) // 2)
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


def along(ctx: Context, input: Value, dims: Any) -> Value:
    """Combine positions along some axes, in their order."""
    rank = len(input.shape or ())
    axes = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims or range(rank))} if rank else set()
    if isinstance(input, Features):
        if not axes.isdisjoint((0, *input.axes)):
            raise ctx.error("it depends on the order of the features, or combines samples")
        return Features(input.ids, input.axes)
    if isinstance(input, Parameter) and input.counts:
        return with_axes(input, ctx.shapes[ctx.node.name], [None if axis in axes else axis for axis in range(rank)])
    return ctx.constant([input])


@rule(*spellings("cumsum cumprod logcumsumexp"))
def running(ctx: Context, input: Value, dim: int, *, dtype: Any = None) -> Value:
    """Accumulate positions along one axis."""
    return along(ctx, input, dim)


@rule(*spellings("diff"))
def difference(ctx: Context, input: Value, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Value:
    """Subtract neighboring positions along one axis."""
    if prepend is not None or append is not None:
        raise ctx.error("it concatenates a further tensor")
    return along(ctx, input, dim)


@rule(*spellings("cummax cummin"))
def running_extreme(ctx: Context, input: Value, dim: int) -> Any:
    """Accumulate positions along one axis, and return their indices too."""
    value = along(ctx, input, dim)
    return value, value


@rule(*spellings("sort"))
def sort(ctx: Context, input: Value, dim: int = -1, descending: bool = False, stable: bool | None = None) -> Any:
    """Sort positions of each feature, and return their indices too."""
    value = along(ctx, input, dim)
    return value, value


@rule(*spellings("argsort"))
def order(ctx: Context, input: Value, dim: int = -1, descending: bool = False, stable: bool | None = None) -> Value:
    """Return the indices that sort positions of each feature."""
    return along(ctx, input, dim)


@rule(*spellings("topk"))
def largest(ctx: Context, input: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """Return the largest positions of each feature, and their indices."""
    value = along(ctx, input, dim)
    return value, value


_OF_ONE_AXIS = "fft ifft rfft irfft hfft ihfft"
_OF_SEVERAL = "fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn"


@rule(*(getattr(torch.fft, name) for name in _OF_ONE_AXIS.split()), traits=Trait.LINEAR)
def fourier(ctx: Context, input: Value, n: int | None = None, dim: int = -1, norm: str | None = None) -> Value:
    """Transform positions along one axis."""
    return along(ctx, input, dim)


@rule(*(getattr(torch.fft, name) for name in _OF_SEVERAL.split()), traits=Trait.LINEAR)
def fourier_of_several(ctx: Context, input: Value, s: Any = None, dim: Any = None, norm: str | None = None) -> Value:
    """Transform positions along several axes."""
    two = ctx.node.target.__name__.partition(".")[0].endswith("2")  # type: ignore[union-attr]
    last = range(-len(s), 0) if s is not None else None
    return along(ctx, input, dim if dim is not None else (-2, -1) if two else last)


@rule(*(getattr(torch.fft, name) for name in ("fftshift", "ifftshift")))
def shift(ctx: Context, input: Value, dim: Any = None) -> Value:
    """Roll positions along some axes."""
    return along(ctx, input, dim)


@rule(*spellings("tril triu"))
def triangle(ctx: Context, input: Value, diagonal: int = 0) -> Value:
    """Set positions on one side of a diagonal to zero."""
    return within(ctx, input, -2)


@rule(F.grid_sample, torch.grid_sampler, traits=Trait.POOLING)
def sample(ctx: Context, input: Value, grid: Any, *args: Any, **kwargs: Any) -> Value:
    """Read positions at coordinates, which are matched by index."""
    if isinstance(grid, Features):
        ctx.pin(grid, f"`{ctx.node.name}` reads them as coordinates")
    ctx.positional(grid)
    return within(ctx, input, 2)


@rule(F.affine_grid, torch.affine_grid_generator)
def affine_grid(ctx: Context, theta: Any, size: Any, *args: Any, **kwargs: Any) -> Value:
    """Create coordinates from the entries of a transformation, which are matched by index."""
    if isinstance(theta, Features):
        ctx.pin(theta, f"`{ctx.node.name}` reads them as a transformation")
    ctx.positional(theta)
    return ctx.constant([])


@rule(F.unfold)
def patches(ctx: Context, input: Value, kernel_size: Any, *args: Any, **kwargs: Any) -> Value:
    """Copy each channel once for each position of the kernel."""
    if not isinstance(input, Features):
        return ctx.constant([input])
    x = by_channel(ctx, input, 2)
    if x.axes != (1,) or x.rank != 4:
        raise ctx.error("its channels are not on axis 1 of its input")
    sizes = [kernel_size] * 2 if isinstance(kernel_size, int) else kernel_size
    return Features(np.repeat(x.ids, math.prod(sizes * (3 - len(sizes)))), (1,))


@rule(F.fold)
def sum_of_patches(ctx: Context, input: Value, output_size: Any, kernel_size: Any, *args: Any, **kwargs: Any) -> Value:
    """Sum patches of each channel, whose positions have one order."""
    if not isinstance(input, Features):
        return ctx.constant([input])
    if input.axes != (1,) or input.rank != 3:
        raise ctx.error("its channels are not on axis 1 of its input")
    sizes = [kernel_size] * 2 if isinstance(kernel_size, int) else kernel_size
    ids = input.ids.reshape(-1, math.prod(sizes * (3 - len(sizes))))
    for inner in range(1, ids.shape[1]):
        ctx.tie(ids[:, 0], ids[:, inner])
    return Features(ids[:, 0], (1,))


# Variants that only ATen has


def constant_pad(ctx: Context, input: Value, pad_: Sequence[int], value: float | None = 0) -> Value:
    """Pad positions. Padded channels are new constant features."""
    return pad(ctx, input, pad_, value=value)


def pad_positions(ctx: Context, input: Value, padding: Sequence[int]) -> Value:
    """Pad positions."""
    return within(ctx, input, -len(padding) // 2)


def max_pool_with_indices(axes: int) -> Rule:
    """Return the rule of a pooling that also returns the indices of positions."""

    def max_pool(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Any:
        """Pool positions along the last axes."""
        return pool(ctx, input, axes, return_indices=True)

    return max_pool
