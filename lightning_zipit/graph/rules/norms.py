"""Rules of normalizations, and of other operators with a parameter entry per channel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_zipit.graph.align import broadcast, by_channel, entrywise, mix
from lightning_zipit.graph.computed import as_features, combined, with_axes
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Trait, module_rule, rule, spellings
from lightning_zipit.graph.values import Features, Parameter, Plain, Value

PER_CHANNEL = Trait.NORM | Trait.PER_FEATURE
STATISTICS = ("weight", "bias", "running_mean", "running_var")


def per_channel(ctx: Context, input: Value, *parameters: Any) -> Value:
    """Transform each channel separately, with one entry of each parameter per channel."""
    if isinstance(input, Parameter):
        raise ctx.error("its input is a parameter")
    if isinstance(input, Features) and 1 in input.axes:
        input = by_channel(ctx, input, 2)
    if isinstance(input, Features) and input.axes != (1,):
        raise ctx.error("its channels are not on axis 1 of its input")
    for parameter in parameters:
        if isinstance(parameter, Parameter):
            ctx.write(parameter, 0, input)
        elif parameter is not None:
            raise ctx.error("one of its parameters is computed from others and is not a parameter of the network")
    return input


@module_rule(
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    traits=PER_CHANNEL,
    ignored=("momentum",),
)
def batch_norm_module(ctx: Context, module: nn.Module, input: Value) -> Value:
    """Transform each channel separately, with one entry of each parameter per channel."""
    return per_channel(ctx, input, *(ctx.parameter(name) for name in STATISTICS))


@module_rule("torchvision.ops.misc.FrozenBatchNorm2d", traits=PER_CHANNEL)
def frozen_batch_norm(ctx: Context, module: nn.Module, input: Value) -> Value:
    """Transform each channel of images separately, with one entry of each parameter per channel."""
    if len(input.shape or (0,) * 4) != 4:
        raise ctx.error("its input is not a batch of images")
    return batch_norm_module(ctx, module, input)


@module_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, traits=PER_CHANNEL, ignored=("momentum",))
def instance_norm_module(ctx: Context, module: nn.InstanceNorm1d, input: Value) -> Value:
    """Transform each channel separately, with one entry of each parameter per channel."""
    if isinstance(input, Features) and input.rank == module._get_no_batch_dim():
        raise ctx.error("its input has no batch axis, so it reads the batch as channels")
    return batch_norm_module(ctx, module, input)


@rule(F.batch_norm, torch.batch_norm, traits=PER_CHANNEL, ignored=("momentum",))
def batch_norm(
    ctx: Context,
    input: Value,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Value:
    """Transform each channel separately, with one entry of each parameter per channel."""
    return per_channel(ctx, input, running_mean, running_var, weight, bias)


@rule(F.instance_norm, traits=PER_CHANNEL, ignored=("momentum",))
def instance_norm(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Value:
    """Transform each channel separately, with one entry of each parameter per channel."""
    return batch_norm(ctx, input, *args, **kwargs)


@module_rule(nn.PReLU, traits=Trait.POINTWISE | Trait.PER_FEATURE)
def prelu_module(ctx: Context, module: nn.PReLU, input: Value) -> Value:
    """Apply one slope per channel, or one slope for all channels."""
    return prelu(ctx, input, ctx.weight())


@rule(*spellings("prelu"), traits=Trait.POINTWISE | Trait.PER_FEATURE)
def prelu(ctx: Context, input: Value, weight: Any) -> Value:
    """Apply one slope per channel, or one slope for all channels."""
    if isinstance(weight, Parameter) and not weight.counts:
        return entrywise(ctx, input)
    return per_channel(ctx, input, weight)


@module_rule(nn.GroupNorm, traits=PER_CHANNEL | Trait.SYMMETRIC)
def group_norm_module(ctx: Context, module: nn.GroupNorm, input: Value) -> Value:
    """Normalize each group of channels jointly. Groups are units."""
    return group_norm(ctx, input, module.num_groups, ctx.parameter("weight"), ctx.parameter("bias"))


@rule(*spellings("group_norm"), traits=PER_CHANNEL | Trait.SYMMETRIC)
def group_norm(
    ctx: Context, input: Value, num_groups: int, weight: Any = None, bias: Any = None, *args: Any, **kwargs: Any
) -> Value:
    """Normalize each group of channels jointly. Groups are units."""
    input = per_channel(ctx, input, weight, bias)
    if isinstance(input, Features):
        ctx.mix(input)
        ctx.units(input.ids.reshape(num_groups, -1), "groups")
    return input


@module_rule(nn.LayerNorm, nn.RMSNorm, traits=PER_CHANNEL | Trait.SYMMETRIC)
def layer_norm_module(ctx: Context, module: nn.LayerNorm, input: Value) -> Value:
    """Normalize the last axes jointly, with one entry of each parameter per entry of these axes."""
    bias = ctx.parameter("bias") if hasattr(module, "bias") else None
    return layer_norm(ctx, input, module.normalized_shape, ctx.parameter("weight"), bias)


@rule(*spellings("layer_norm rms_norm"), traits=PER_CHANNEL | Trait.SYMMETRIC)
def layer_norm(
    ctx: Context, input: Value, normalized_shape: Any, weight: Any = None, bias: Any = None, *args: Any, **kwargs: Any
) -> Value:
    """Normalize the last axes jointly, with one entry of each parameter per entry of these axes."""
    parameters = [value for value in (weight, bias) if isinstance(value, (Parameter, Features, Plain))]
    if isinstance(input, Parameter) and input.counts and len(normalized_shape) == 1:
        input = as_features(ctx, input, -1)
    if not isinstance(input, Features):
        return entrywise(ctx, input, *parameters)
    mix(ctx, input, set(range(input.rank - len(normalized_shape), input.rank)))
    for parameter in parameters:
        broadcast(ctx, input, parameter)
    return input


@rule(torch._weight_norm, traits=Trait.SYMMETRIC)
def weight_norm(ctx: Context, v: Value, g: Value, dim: int = 0) -> Value:
    """Scale a weight to given norms. A norm does not depend on the order along the axes that it reduces."""
    if not isinstance(v, Parameter) or not isinstance(g, Parameter):
        raise ctx.error("it normalizes a tensor that is not a parameter")
    return combined([v, g])


@rule(torch.norm_except_dim, traits=Trait.SYMMETRIC)
def norm_except_dim(ctx: Context, v: Value, pow: int = 2, dim: int = 0) -> Value:
    """Reduce all axes of a weight but one to its norm."""
    if not isinstance(v, Parameter):
        raise ctx.error("it normalizes a tensor that is not a parameter")
    return with_axes(v, ctx.shapes[ctx.node.name], [axis if axis == dim % v.rank else None for axis in range(v.rank)])


# Variants that only ATen has


def native_layer_norm(ctx: Context, input: Value, normalized_shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    """Normalize the last axes jointly, with one entry of each parameter per entry of these axes."""
    output = layer_norm(ctx, input, normalized_shape, weight, bias)
    spread: Value = Plain()
    if isinstance(output, Features):
        axes = set(range(output.rank - len(normalized_shape), output.rank))
        ids = mix(ctx, output, axes)
        kept = tuple(axis for axis in output.axes if axis not in axes)
        spread = Plain() if ids is None else Features(ids, kept)
    return output, spread, spread


def native_group_norm(ctx: Context, input: Value, weight: Any, bias: Any, *sizes: Any) -> Any:
    """Normalize each group of channels jointly. Groups are units."""
    output = group_norm(ctx, input, sizes[3], weight, bias)
    groups: Value = Plain()
    if isinstance(output, Features):
        groups = Features(ctx.units(output.ids.reshape(sizes[3], -1), "groups"), (1,))
    return output, groups, groups


def native_batch_norm(ctx: Context, input: Value, weight: Any, bias: Any, mean: Any, variance: Any, *_: Any) -> Any:
    """Transform each channel separately, with one entry of each parameter per channel."""
    return per_channel(ctx, input, mean, variance, weight, bias), Plain(), Plain()
