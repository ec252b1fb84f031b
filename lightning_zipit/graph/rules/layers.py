"""Rules of layers with weights: convolution, linear, bilinear, embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Trait, module_rule, rule, spellings
from lightning_zipit.graph.values import Features, Parameter, Plain, Value

LAYER = Trait.PRODUCER | Trait.LINEAR


def weight_of(ctx: Context, weight: Any, rank: int) -> Parameter:
    """Check that a layer's weight is a parameter of the network, and return it."""
    if not isinstance(weight, Parameter):
        raise ctx.error("its weight is computed and is not a parameter of the network")
    if len(weight.shape) != rank:
        raise ctx.error(f"`{weight.name}` has {len(weight.shape)} axes instead of {rank}")
    return weight


def input_of(ctx: Context, x: Any) -> Features | Plain:
    """Check a layer's input, and return it. A buffer as input is a constant."""
    value = ctx.constant([x]) if isinstance(x, Parameter) and (x.constant or not x.counts) else x
    if not isinstance(value, (Features, Plain)):
        raise ctx.error("its input is a parameter")
    return value


def convolution(
    ctx: Context, input: Any, weight: Any, bias: Parameter | None, groups: int, axes: int, transposed: bool = False
) -> Value:
    """Read the input channels and write new output channels. Groups are units.

    A depthwise convolution has one channel per group. It scales each channel separately, so it preserves features.
    """
    weight, x = weight_of(ctx, weight, axes + 2), input_of(ctx, input)
    if x.shape is not None and len(x.shape) != axes + 2:
        raise ctx.error("its input has no batch axis, so it reads the batch as channels")
    made = ctx.fresh(weight.shape[1] * groups if transposed else weight.shape[0])
    if not isinstance(x, Features):
        if groups > 1:
            ctx.pin(made, f"`{ctx.node.name}` reads the network's input in groups")
    elif x.axes != (1,):
        raise ctx.error("its input channels are not on axis 1 of its input")
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


def _convolution_functions(axes: int) -> None:
    """Register the rules of convolutions with one to three axes."""

    def forward(
        ctx: Context,
        input: Value,
        weight: Value,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Value:
        """Read the input channels and write new output channels. Groups are units."""
        return convolution(ctx, input, weight, bias, groups, axes)

    def transposed(
        ctx: Context,
        input: Value,
        weight: Value,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Value:
        """Read the input channels and write new output channels. Groups are units."""
        return convolution(ctx, input, weight, bias, groups, axes, transposed=True)

    rule(*spellings(f"conv{axes}d"), traits=LAYER)(forward)
    rule(*spellings(f"conv_transpose{axes}d"), traits=LAYER)(transposed)


for _axes in (1, 2, 3):
    _convolution_functions(_axes)


@module_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, traits=LAYER)
def convolution_module(ctx: Context, module: nn.Conv2d, input: Value) -> Value:
    """Read the input channels and write new output channels. Groups are units."""
    axes = len(module.kernel_size)
    return convolution(ctx, input, ctx.weight(), ctx.parameter("bias"), module.groups, axes)


@module_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, traits=LAYER)
def transposed_convolution_module(
    ctx: Context, module: nn.ConvTranspose2d, input: Value, output_size: Any = None
) -> Value:
    """Read the input channels and write new output channels. Groups are units."""
    axes = len(module.kernel_size)
    return convolution(ctx, input, ctx.weight(), ctx.parameter("bias"), module.groups, axes, transposed=True)


@rule(F.linear, torch._C._nn.linear, traits=LAYER)
def linear(ctx: Context, input: Value, weight: Value, bias: Parameter | None = None) -> Value:
    """Read the last axis (each feature H·W times after a flatten) and write a new last axis."""
    weight, x = weight_of(ctx, weight, 2), input_of(ctx, input)
    if isinstance(x, Features) and x.rank - 1 not in x.axes:
        return _mix_positions(ctx, x, weight, bias)
    _check_last(ctx, x)
    ctx.read(weight, 1, x)
    output = Features(ctx.fresh(weight.shape[0]), (ctx.rank - 1,))
    ctx.write(weight, 0, output)
    ctx.write(bias, 0, output)
    return output


def _mix_positions(ctx: Context, x: Features, *parameters: Parameter | None) -> Features:
    """Reject a layer that mixes positions in the trunk, because the order of its outputs differs between models."""
    if ctx.shared:
        raise ctx.error(
            "it mixes positions, such as the tokens of an MLP-Mixer, and the order of its outputs differs between "
            "models"
        )
    ctx.positional(parameters)
    return x


def _check_last(ctx: Context, x: Value) -> None:
    if isinstance(x, Features) and x.axes != (x.rank - 1,):
        raise ctx.error("its input features are not on the last axis only")


@module_rule(nn.Linear, traits=LAYER)
def linear_module(ctx: Context, module: nn.Linear, input: Value) -> Value:
    """Read the last axis (each feature H·W times after a flatten) and write a new last axis."""
    return linear(ctx, input, ctx.weight(), ctx.parameter("bias"))


@rule(*spellings("bilinear"), traits=LAYER)
def bilinear(ctx: Context, input1: Value, input2: Value, weight: Value, bias: Parameter | None = None) -> Value:
    """Read the last axes of two tensors and write a new last axis."""
    weight = weight_of(ctx, weight, 3)
    for axis, given in enumerate((input1, input2), 1):
        x = input_of(ctx, given)
        _check_last(ctx, x)
        ctx.read(weight, axis, x)
    output = Features(ctx.fresh(weight.shape[0]), (ctx.rank - 1,))
    ctx.write(weight, 0, output)
    ctx.write(bias, 0, output)
    return output


@module_rule(nn.Bilinear, traits=LAYER)
def bilinear_module(ctx: Context, module: nn.Bilinear, input1: Value, input2: Value) -> Value:
    """Read the last axes of two tensors and write a new last axis."""
    return bilinear(ctx, input1, input2, ctx.weight(), ctx.parameter("bias"))


def look_up(ctx: Context, index: Value, weight: Any, max_norm: float | None) -> Value:
    """Write new features on a new last axis, from integer indices."""
    weight, index = weight_of(ctx, weight, 2), input_of(ctx, index)
    if isinstance(index, Features):
        raise ctx.error("its indices are features")
    if max_norm is not None:
        raise ctx.error("it rescales its weight in the forward (`max_norm`)")
    output = Features(ctx.fresh(weight.shape[1]), (ctx.rank - 1,))
    ctx.write(weight, 1, output)
    return output


@rule(F.embedding, traits=LAYER | Trait.LOOKUP)
def embedding(
    ctx: Context,
    input: Value,
    weight: Value,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Value:
    """Write new features on a new last axis, from integer indices."""
    return look_up(ctx, input, weight, max_norm)


@module_rule(nn.Embedding, traits=LAYER | Trait.LOOKUP)
def embedding_module(ctx: Context, module: nn.Embedding, input: Value) -> Value:
    """Write new features on a new last axis, from integer indices."""
    return look_up(ctx, input, ctx.weight(), module.max_norm)


@rule(F.embedding_bag, traits=LAYER | Trait.LOOKUP)
def embedding_bag(
    ctx: Context, input: Value, weight: Value, offsets: Any = None, max_norm: float | None = None, *_: Any, **__: Any
) -> Value:
    """Write new features on a new last axis, from integer indices."""
    return look_up(ctx, input, weight, max_norm)


@module_rule(nn.EmbeddingBag, traits=LAYER | Trait.LOOKUP)
def embedding_bag_module(ctx: Context, module: nn.EmbeddingBag, input: Value, *args: Any, **kwargs: Any) -> Value:
    """Write new features on a new last axis, from integer indices."""
    return look_up(ctx, input, ctx.weight(), module.max_norm)
