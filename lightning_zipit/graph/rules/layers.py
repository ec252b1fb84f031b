"""Rules of layers with weights: convolution, linear, bilinear, embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_zipit.graph.align import by_channel
from lightning_zipit.graph.computed import as_features
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


def input_of(ctx: Context, x: Any, axis: int | None = None) -> Features | Plain:
    """Check a layer's input, and return it. A buffer as input is a constant.

    Args:
        ctx: the context.
        x: the input.
        axis: the axis that the layer reads. A parameter as input holds features along it, and positions along others.
    """
    if isinstance(x, Parameter) and (x.constant or not x.counts):
        return ctx.constant([x])
    if isinstance(x, Parameter) and axis is not None:
        return as_features(ctx, x, axis)
    if not isinstance(x, (Features, Plain)):
        raise ctx.error("its input is a parameter")
    return x


def convolution(
    ctx: Context,
    input: Any,
    weight: Any,
    bias: Parameter | None,
    groups: int,
    axes: int,
    transposed: bool = False,
    padding: Any = None,
) -> Value:
    """Read the input channels and write new output channels. Groups are units.

    A depthwise convolution has one channel per group. It scales each channel separately, so it preserves features.
    """
    weight, x = weight_of(ctx, weight, axes + 2), input_of(ctx, input, 1)
    if x.shape is not None and len(x.shape) != axes + 2:
        raise ctx.error("its input has no batch axis, so it reads the batch as channels")
    if isinstance(x, Features) and 1 in x.axes:
        x = by_channel(ctx, x, 2)
    made = ctx.fresh(weight.shape[1] * groups if transposed else weight.shape[0])
    if not isinstance(x, Features):
        if groups > 1:
            ctx.pin(made, f"`{ctx.node.name}` reads the network's input in groups")
    elif x.axes != (1,):
        return _covering(ctx, x, weight, bias, groups, None if transposed else padding)
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


def _covering(
    ctx: Context, x: Features, weight: Parameter, bias: Parameter | None, groups: int, padding: Any
) -> Features:
    """Read features with a kernel that covers them, such as that of a convolution over words.

    The input is ``(samples, 1, words, features)``, and the kernel is as wide as the features.
    """
    axis = x.axes[0]
    amounts = [padding] * (weight.rank - 2) if isinstance(padding, int) else [*(padding or ())]
    amounts = amounts * (weight.rank - 2) if len(amounts) == 1 else amounts
    unpadded = amounts[axis - 2 : axis - 1] == [0] or padding == "valid"
    if len(x.axes) > 1 or axis < 2 or groups > 1 or weight.shape[axis] != x.shape[axis] or not unpadded:
        raise ctx.error("its input channels are not on axis 1 of its input")
    output = Features(ctx.fresh(weight.shape[0]), (1,))
    ctx.write(weight, 0, output)
    ctx.read(weight, axis, x)
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
        return convolution(ctx, input, weight, bias, groups, axes, padding=padding)

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


def any_convolution(
    ctx: Context,
    input: Value,
    weight: Value,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Value:
    """Read the input channels and write new output channels. Groups are units."""
    axes = len(weight.shape or ()) - 2
    return convolution(ctx, input, weight, bias, groups, axes, transposed, padding)


@module_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, traits=LAYER)
def convolution_module(ctx: Context, module: nn.Conv2d, input: Value) -> Value:
    """Read the input channels and write new output channels. Groups are units."""
    axes = len(module.kernel_size)
    padding = module.padding if module.padding_mode == "zeros" else None
    return convolution(ctx, input, ctx.weight(), ctx.parameter("bias"), module.groups, axes, padding=padding)


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
    weight, x = weight_of(ctx, weight, 2), input_of(ctx, input, -1)
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


def bags(ctx: Context, weight: Value, indices: Value, offsets: Value, *args: Any) -> Any:
    """Write new features on a new last axis, from integer indices."""
    weight, index = weight_of(ctx, weight, 2), input_of(ctx, indices)
    if isinstance(index, Features):
        raise ctx.error("its indices are features")
    output = Features(ctx.fresh(weight.shape[1]), (1,))
    ctx.write(weight, 1, output)
    return output, Plain(), Plain(), Plain()
