"""Operators that leave features what they are: activations, sums, pooling, and what mixes them symmetrically."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lightning_zipit.graph.align import broadcast, mix
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Trait, module_rule, rule
from lightning_zipit.graph.values import Features, Parameter, Plain, Value


@rule(
    *(F.relu_, F.leaky_relu_, F.elu_, F.hardtanh_, torch.relu_, "relu_", "sigmoid_", "tanh_", "clamp_"),
    traits=Trait.POINTWISE | Trait.IN_PLACE,
)
@rule(
    *("contiguous", "detach", "to", "float", "half", "double", "bfloat16", "type", "type_as", "cpu", "cuda"),
    "requires_grad_",
    traits=Trait.POINTWISE | Trait.VIEW,
)
@rule(
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.softplus, F.softsign, F.logsigmoid, F.tanhshrink),
    *(F.softshrink, F.hardshrink, F.threshold, F.sigmoid, F.tanh),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.abs, torch.exp, torch.log, torch.sqrt, torch.rsqrt),
    *(torch.square, torch.neg, torch.clamp, torch.pow, torch.clone, torch.sign, torch.erf, torch.selu, torch.celu),
    *(operator.neg, operator.pow),
    *("relu", "sigmoid", "tanh", "abs", "exp", "log", "sqrt", "rsqrt", "square", "neg"),
    *("clamp", "clip", "pow", "clone"),
    traits=Trait.POINTWISE,
    ignored=("inplace",),
)
def elementwise(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Value:
    """Each entry by itself: the features stay what they are."""
    if any(isinstance(value, Features) for value in (*args, *kwargs.values())) and ctx.node.target != "type_as":
        raise ctx.error("it takes a second tensor")
    return input


@rule(
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    "torchvision.ops.stochastic_depth.stochastic_depth",
    traits=Trait.POINTWISE | Trait.IDENTITY | Trait.POOLING | Trait.VIEW,
)
def unchanged(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Value:
    """Does nothing in eval mode."""
    return input


@module_rule(
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *("torchvision.ops.stochastic_depth.StochasticDepth", "timm.layers.drop.DropPath"),
    traits=Trait.POINTWISE | Trait.IDENTITY | Trait.POOLING | Trait.VIEW,
)
def unchanged_module(ctx: Context, module: nn.Module, x: Value, *args: Any) -> Value:
    return x


@module_rule(
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid),
    *(nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold),
    traits=Trait.POINTWISE,
    ignored=("inplace",),
)
def elementwise_module(ctx: Context, module: nn.Module, x: Value) -> Value:
    return x


@rule(operator.add, torch.add, "add", traits=Trait.SUM)
@rule(operator.iadd, "add_", traits=Trait.SUM | Trait.IN_PLACE)
@rule(operator.sub, torch.sub, "sub", traits=Trait.DIFFERENCE)
@rule(operator.isub, "sub_", traits=Trait.DIFFERENCE | Trait.IN_PLACE)
@rule(operator.mul, torch.mul, "mul", traits=Trait.PRODUCT)
@rule(operator.imul, "mul_", traits=Trait.PRODUCT | Trait.IN_PLACE)
@rule(operator.truediv, torch.div, torch.maximum, torch.minimum)
@rule("div", "maximum", "minimum", "masked_fill")
@rule(operator.itruediv, "div_", traits=Trait.IN_PLACE)
def binary(ctx: Context, input: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
    """Two tensors entry by entry: their features are tied. A size, or a number, ties nothing."""
    if not isinstance(input, Features) and not isinstance(other, Features):
        parameters = [value for value in (input, other) if isinstance(value, Parameter)]
        alone = len(parameters) == 1 and isinstance(other if parameters[0] is input else input, (int, float))
        return parameters[0] if alone else ctx.constant([input, other])
    if _extent(other) > _extent(input):
        input, other = other, input
    broadcast(ctx, input, other)
    return input


def _extent(value: Any) -> tuple[int, int]:
    return (value.ids.size, value.rank) if isinstance(value, Features) else (0, 0)


@rule(torch.addcmul, torch.addcdiv, torch.lerp, "addcmul", "addcdiv", "lerp")
def three(ctx: Context, input: Any, first: Any, second: Any, **kwargs: Any) -> Any:
    return binary(ctx, binary(ctx, first, second), input)


@rule(torch.where)
def where(ctx: Context, condition: Value, input: Any, other: Any) -> Value:
    return binary(ctx, binary(ctx, input, other), condition)


# What mixes features, and treats all of them alike


@rule(
    *(F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, "softmax", "log_softmax", F.gumbel_softmax),
    traits=Trait.SYMMETRIC,
)
def softmax(ctx: Context, input: Value, dim: int = -1, *args: Any, **kwargs: Any) -> Value:
    if isinstance(input, Features):
        mix(ctx, input, {dim % input.rank})
    return input


@module_rule(nn.Softmax, nn.LogSoftmax, traits=Trait.SYMMETRIC)
def softmax_module(ctx: Context, module: nn.Softmax, x: Value) -> Value:
    return softmax(ctx, x, -1 if module.dim is None else module.dim)


@rule(F.normalize, traits=Trait.SYMMETRIC)
def normalize(ctx: Context, input: Value, p: float = 2.0, dim: int = 1, **kwargs: Any) -> Value:
    return softmax(ctx, input, dim)


@rule(
    *(torch.mean, torch.sum, torch.amax, torch.amin, torch.std, torch.var),
    *("mean", "sum", "amax", "amin", "std", "var"),
    traits=Trait.POOLING | Trait.SYMMETRIC,
)
def reduce(ctx: Context, input: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    """Over positions each feature by itself; over the features of a head, one feature is left for the head."""
    if not isinstance(input, Features):
        return Plain()
    axes = axes_of(input, range(input.rank) if dim is None else dim)
    if 0 in axes and 0 not in input.axes:
        raise ctx.error("it reduces over the batch")
    ids = mix(ctx, input, axes)
    if ids is None:
        return Plain()
    kept = (axis for axis in input.axes if axis not in axes)
    dropped = set() if keepdim else axes
    return Features(ids, tuple(axis - sum(gone < axis for gone in dropped) for axis in kept))


def axes_of(x: Features, dims: Any) -> set[int]:
    return {dim % x.rank for dim in ([dims] if isinstance(dims, int) else dims)}


# Pooling and other operators that act on positions


@rule(
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.lp_pool1d, F.lp_pool2d, F.lp_pool3d, F.interpolate, F.upsample),
    traits=Trait.POOLING,
)
def resample(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Value:
    """Works within each channel."""
    if kwargs.get("return_indices"):
        raise ctx.error("it returns indices")
    if isinstance(input, Features) and input.axes != (1,):
        raise ctx.error("its channels are not axis 1 of its input")
    return input


@module_rule(
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d),
    *(nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d),
    traits=Trait.POOLING,
)
def resample_module(ctx: Context, module: nn.Module, x: Value) -> Value:
    return resample(ctx, x, return_indices=getattr(module, "return_indices", False))


@rule(
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    traits=Trait.POOLING,
)
def adaptive_pool(ctx: Context, input: Value, output_size: Any, return_indices: bool = False) -> Value:
    return resample(ctx, input, return_indices=return_indices)


@module_rule(
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    traits=Trait.POOLING,
)
def adaptive_pool_module(ctx: Context, module: nn.AdaptiveAvgPool2d, x: Value) -> Value:
    return adaptive_pool(ctx, x, module.output_size)


@rule(F.pad)
def pad(ctx: Context, input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    """Padded positions change nothing; padded channels are features of their own, zero in every model."""
    if not isinstance(input, Features):
        return Plain()
    behind = input.rank - 1 - input.axes[0]
    before, after = pad[2 * behind : 2 * behind + 2] or (0, 0)
    if not before and not after:
        return input
    if before < 0 or after < 0 or mode != "constant" or len(input.axes) > 1:
        raise ctx.error("it pads the features in a way that is not understood")
    return Features(np.concatenate([ctx.fresh(before), input.ids, ctx.fresh(after)]), input.axes)


@rule(torch._assert)
def assertion(ctx: Context, *args: Any) -> None:
    return None
