"""Layers with weights: convolution, linear, embedding, normalisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_zipit.graph.align import broadcast, mix
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Trait, module_rule, rule
from lightning_zipit.graph.values import Features, Parameter, Value


def convolution(
    ctx: Context, x: Value, weight: Value, bias: Parameter | None, groups: int, transposed: bool = False
) -> Value:
    """Reads the input channels, makes new output channels; with groups, both are reordered group by group.

    A depthwise convolution is the case of one channel a group: it scales each channel by itself.
    """
    if not isinstance(weight, Parameter):
        raise ctx.error("its weight is not a parameter of the network, but computed from one")
    made = ctx.fresh(weight.shape[1] * groups if transposed else weight.shape[0])
    if not isinstance(x, Features):
        if groups > 1:
            ctx.pin(made, f"`{ctx.node.name}` reads the network's input in groups")
    elif x.axes != (1,):
        raise ctx.error("its input channels are not axis 1 of its input")
    elif groups > 1 and x.ids.size == made.size == groups:
        made = x.ids
    elif groups > 1:
        ctx.units(made.reshape(groups, -1), "groups", ctx.units(x.ids.reshape(groups, -1), "groups"))
    output = Features(made, (1,))
    if transposed:
        ctx.read(weight, 0, x)
        ctx.write(weight, 1, output, groups)
    else:
        ctx.write(weight, 0, output)
        if groups == 1 or weight.shape[1] > 1:
            ctx.read(weight, 1, x, groups)
    ctx.write(bias, 0, output)
    return output


@module_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, traits=Trait.PRODUCER | Trait.LINEAR)
def convolution_module(ctx: Context, module: nn.Conv2d, x: Value) -> Value:
    return convolution(ctx, x, ctx.weight(), ctx.parameter("bias"), module.groups)


@module_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, traits=Trait.PRODUCER | Trait.LINEAR)
def transposed_convolution_module(ctx: Context, module: nn.ConvTranspose2d, x: Value, *args: Any) -> Value:
    return convolution(ctx, x, ctx.weight(), ctx.parameter("bias"), module.groups, transposed=True)


@rule(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, traits=Trait.PRODUCER | Trait.LINEAR)
def convolution_function(
    ctx: Context, input: Value, weight: Value, bias: Any = None, *args: Any, groups: int = 1, **kwargs: Any
) -> Value:
    return convolution(ctx, input, weight, bias, args[3] if len(args) > 3 else groups)


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, traits=Trait.PRODUCER | Trait.LINEAR)
def transposed_convolution(
    ctx: Context, input: Value, weight: Value, bias: Any = None, *args: Any, groups: int = 1, **kwargs: Any
) -> Value:
    return convolution(ctx, input, weight, bias, args[3] if len(args) > 3 else groups, transposed=True)


@rule(F.linear, torch._C._nn.linear, traits=Trait.PRODUCER | Trait.LINEAR)
def linear(ctx: Context, input: Value, weight: Value, bias: Parameter | None = None) -> Value:
    """Reads the last axis (each feature H·W times, after a flatten), makes a new last axis."""
    if not isinstance(weight, Parameter):
        raise ctx.error("its weight is not a parameter of the network, but computed from one")
    if isinstance(input, Features) and input.axes != (input.rank - 1,):
        if input.rank - 1 in input.axes:
            raise ctx.error("its input features are not the last axis alone")
        return input  # it mixes positions, such as the tokens of an MLP-Mixer
    ctx.read(weight, 1, input)
    output = Features(ctx.fresh(weight.shape[0]), (ctx.rank - 1,))
    ctx.write(weight, 0, output)
    ctx.write(bias, 0, output)
    return output


@module_rule(nn.Linear, traits=Trait.PRODUCER | Trait.LINEAR)
def linear_module(ctx: Context, module: nn.Linear, x: Value) -> Value:
    return linear(ctx, x, ctx.weight(), ctx.parameter("bias"))


@rule(F.embedding, traits=Trait.PRODUCER | Trait.LINEAR)
def embedding(ctx: Context, input: Value, weight: Parameter, *args: Any, **kwargs: Any) -> Value:
    """Makes new features on a new last axis."""
    output = Features(ctx.fresh(weight.shape[1]), (ctx.rank - 1,))
    ctx.write(weight, 1, output)
    return output


@module_rule(nn.Embedding, traits=Trait.PRODUCER | Trait.LINEAR)
def embedding_module(ctx: Context, module: nn.Embedding, x: Value) -> Value:
    return embedding(ctx, x, ctx.weight())


# Normalisation


@module_rule(
    *(nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm),
    "torchvision.ops.misc.FrozenBatchNorm2d",
    traits=Trait.NORM | Trait.PER_FEATURE,
    ignored=("momentum",),
)
def batch_norm_module(ctx: Context, module: nn.Module, x: Value) -> Value:
    names = ("weight", "bias", "running_mean", "running_var")
    return batch_norm(ctx, x, *(ctx.parameter(name) for name in names))


@rule(F.batch_norm, torch.batch_norm, F.instance_norm, traits=Trait.NORM | Trait.PER_FEATURE, ignored=("momentum",))
def batch_norm(ctx: Context, input: Value, *parameters: Any, **named: Any) -> Value:
    """Each channel by itself."""
    if isinstance(input, Features):
        if input.axes != (1,):
            raise ctx.error("its channels are not axis 1 of its input")
        for parameter in (*parameters, *named.values()):
            if isinstance(parameter, Parameter):
                ctx.write(parameter, 0, input)
    return input


@module_rule(nn.PReLU, traits=Trait.POINTWISE | Trait.PER_FEATURE)
def prelu_module(ctx: Context, module: nn.PReLU, x: Value) -> Value:
    return batch_norm(ctx, x, *([ctx.weight()] if module.num_parameters > 1 else []))


@rule(F.prelu, torch.prelu, "prelu", traits=Trait.POINTWISE | Trait.PER_FEATURE)
def prelu(ctx: Context, input: Value, weight: Parameter) -> Value:
    return batch_norm(ctx, input, *([weight] if weight.shape[0] != 1 else []))


@module_rule(nn.GroupNorm, traits=Trait.NORM | Trait.PER_FEATURE | Trait.SYMMETRIC)
def group_norm_module(ctx: Context, module: nn.GroupNorm, x: Value) -> Value:
    return group_norm(ctx, x, module.num_groups, ctx.parameter("weight"), ctx.parameter("bias"))


@rule(F.group_norm, torch.group_norm, traits=Trait.NORM | Trait.PER_FEATURE | Trait.SYMMETRIC)
def group_norm(
    ctx: Context, input: Value, num_groups: int, weight: Any = None, bias: Any = None, *args: Any, **kwargs: Any
) -> Value:
    """Mixes the channels of each group, so that groups are reordered as wholes."""
    if isinstance(input, Features):
        batch_norm(ctx, input, weight, bias)
        ctx.mix(input)
        ctx.units(input.ids.reshape(num_groups, -1), "groups")
    return input


@module_rule(nn.LayerNorm, nn.RMSNorm, traits=Trait.NORM | Trait.PER_FEATURE | Trait.SYMMETRIC)
def layer_norm_module(ctx: Context, module: nn.LayerNorm, x: Value) -> Value:
    bias = ctx.parameter("bias") if hasattr(module, "bias") else None
    return layer_norm(ctx, x, module.normalized_shape, ctx.parameter("weight"), bias)


@rule(
    F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm, traits=Trait.NORM | Trait.PER_FEATURE | Trait.SYMMETRIC
)
def layer_norm(
    ctx: Context, input: Value, normalized_shape: Any, weight: Any = None, bias: Any = None, *args: Any, **kwargs: Any
) -> Value:
    """Mixes the last axes, and scales each of their entries."""
    if isinstance(input, Features):
        mix(ctx, input, set(range(input.rank - len(normalized_shape), input.rank)))
        for parameter in (weight, bias):
            if isinstance(parameter, Parameter):
                broadcast(ctx, input, parameter)
    return input
