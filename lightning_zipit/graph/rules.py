"""One small rule per operator: what it does to the features of a tensor.

A rule returns the value of its output. Modules and functions share one rule; modules get there by :func:`module_rule`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lightning_zipit.errors import UnknownShapeError
from lightning_zipit.graph.interpret import PRODUCERS, Context, Rule, register_rule
from lightning_zipit.graph.values import BATCH, Dim, Features, Parameter, Plain, product

Value: TypeAlias = "Features | Plain"


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """Register a rule for functions and tensor methods."""

    def register(function: Rule) -> Rule:
        for op in operators:
            register_rule(op, function)
        return function

    return register


def module_rule(*modules: type[nn.Module], producer: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for module classes."""

    def register(function: Rule) -> Rule:
        for module in modules:
            register_rule(module, function)
        if producer:
            PRODUCERS.add(function)
        return function

    return register


# Layers with weights


def convolution(ctx: Context, x: Value, weight: Parameter, bias: Parameter | None, groups: int, rank: int) -> Value:
    """Reads the input channels, makes new output channels; a depthwise one scales each channel by itself."""
    channels, inputs = weight.shape[0], weight.shape[1] * groups
    if isinstance(x, Features) and (x.axis != 1 or x.repeat != 1):
        raise ctx.error("its input channels are not axis 1 of its input")
    positions: tuple[Dim, ...] = (None,) * (rank - 2)
    if groups > 1 and not (isinstance(x, Features) and groups == inputs == channels):
        raise ctx.error(f"a grouped convolution ({groups} groups of {inputs} channels) is not supported")
    if groups > 1:
        assert isinstance(x, Features)
        output = x.with_positions(*positions)
    else:
        ctx.read(weight, 1, x)
        output = Features(ctx.fresh(channels), 1, (BATCH, channels, *positions))
    ctx.write(weight, 0, output)
    ctx.write(bias, 0, output)
    return output


@module_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, producer=True)
def convolution_module(ctx: Context, module: nn.Conv2d, x: Value) -> Value:
    return convolution(ctx, x, _weight(ctx), ctx.parameter("bias"), module.groups, module.weight.ndim)


@rule(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
def convolution_function(
    ctx: Context,
    input: Value,
    weight: Parameter,
    bias: Parameter | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    return convolution(ctx, input, weight, bias, groups, len(weight.shape))


@rule(F.linear, torch._C._nn.linear)
def linear(ctx: Context, input: Value, weight: Parameter, bias: Parameter | None = None) -> Value:
    """Reads the last axis (each feature H·W times, after a flatten), makes a new last axis."""
    if isinstance(input, Features) and input.axis != input.rank - 1:
        raise ctx.error("its input features are not the last axis of its input")
    ctx.read(weight, 1, input)
    shape = input.shape or (BATCH, None)
    output = Features(ctx.fresh(weight.shape[0]), len(shape) - 1, (*shape[:-1], weight.shape[0]))
    ctx.write(weight, 0, output)
    ctx.write(bias, 0, output)
    return output


@module_rule(nn.Linear, producer=True)
def linear_module(ctx: Context, module: nn.Linear, x: Value) -> Value:
    return linear(ctx, x, _weight(ctx), ctx.parameter("bias"))


PRODUCERS.update({convolution_function, linear})


@module_rule(nn.modules.batchnorm._BatchNorm)
def batch_norm_module(ctx: Context, module: nn.BatchNorm2d, x: Value) -> Value:
    names = ("weight", "bias", "running_mean", "running_var")
    return _scale_channels(ctx, x, *(ctx.parameter(name) for name in names))


@rule(F.batch_norm, torch.batch_norm)
def batch_norm(
    ctx: Context,
    input: Value,
    running_mean: Parameter | None,
    running_var: Parameter | None,
    weight: Parameter | None = None,
    bias: Parameter | None = None,
    *args: Any,
    **kwargs: Any,
) -> Value:
    return _scale_channels(ctx, input, weight, bias, running_mean, running_var)


@module_rule(nn.PReLU)
def prelu_module(ctx: Context, module: nn.PReLU, x: Value) -> Value:
    return _scale_channels(ctx, x, ctx.parameter("weight") if module.num_parameters > 1 else None)


def _scale_channels(ctx: Context, x: Value, *parameters: Parameter | None) -> Value:
    if isinstance(x, Features):
        if x.axis != 1:
            raise ctx.error("its channels are not axis 1 of its input")
        for parameter in parameters:
            ctx.write(parameter, 0, x)
    return x


def _weight(ctx: Context) -> Parameter:
    weight = ctx.parameter("weight")
    if weight is None:
        raise ctx.error("it has no weight yet: run a batch through the model before merging it")
    return weight


# Elementwise


@rule(
    *(F.relu, F.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu, F.celu, F.gelu, F.silu, F.mish),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.hardtanh_, F.softplus, F.softsign, F.logsigmoid, F.tanhshrink),
    *(F.softshrink, F.hardshrink, F.threshold, F.sigmoid, F.tanh),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.abs, torch.exp, torch.log, torch.sqrt, torch.rsqrt),
    *(torch.square, torch.neg, torch.clamp, torch.pow, torch.clone, torch.sign, torch.erf, torch.selu, torch.celu),
    *(operator.neg, operator.pow),
    *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "abs", "exp", "log", "sqrt", "rsqrt", "square", "neg"),
    *("clamp", "clamp_", "clip", "pow", "contiguous", "clone", "detach", "to", "float", "half", "double", "bfloat16"),
    *("type", "type_as", "cpu", "cuda", "requires_grad_"),
)
def elementwise(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Value:
    """Each entry by itself: the features stay what they are."""
    if any(isinstance(value, (Features, Parameter)) for value in (*args, *kwargs.values())):
        raise ctx.error("it takes a second tensor")
    return input


@rule(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
def unchanged(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Value:
    """Does nothing in eval mode."""
    return input


@module_rule(
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
)
def unchanged_module(ctx: Context, module: nn.Module, x: Value) -> Value:
    return x


@module_rule(
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid),
    *(nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold),
)
def elementwise_module(ctx: Context, module: nn.Module, x: Value) -> Value:
    return x


@rule(
    *(operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv),
    *(operator.itruediv, torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum),
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "maximum", "minimum"),
)
def binary(ctx: Context, input: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
    """Two tensors entry by entry: their features are tied. A size, or a number, ties nothing."""
    operands = (input, other)
    features = sorted((value for value in operands if isinstance(value, Features)), key=_extent, reverse=True)
    if not features:
        return ctx._constant(list(operands))
    output = features[0]
    for value in operands:
        if value is output:
            continue
        if isinstance(value, Features):
            output = _tie(ctx, output, value)
        elif isinstance(value, Parameter):
            _broadcast_parameter(ctx, output, value)
        elif isinstance(value, Plain):
            ctx.pin(output)
    return output


def _extent(value: Features) -> tuple[int, int]:
    return len(value.ids), value.rank


def _tie(ctx: Context, first: Features, second: Features) -> Features:
    """Both after broadcasting; where the second has a single feature it is spread over all of the first's."""
    if first.axis - first.rank != second.axis - second.rank:
        raise ctx.error("the features of its two inputs are not on the same axis")
    if len(second.ids) == 1 and len(first.ids) > 1:
        ctx.pin(second)  # that one feature, wherever it was taken from, may not become another
        return first
    if first.repeat is not None and second.repeat is not None and first.repeat != second.repeat:
        raise ctx.error("its two inputs were flattened over different numbers of positions")
    ctx.tie(first.ids, second.ids)
    sizes = zip(first.positions, second.positions, strict=True)
    positions = (b if a == 1 else a if b == 1 else (a if a is not None else b) for a, b in sizes)
    return first.with_positions(*positions)


def _broadcast_parameter(ctx: Context, x: Features, parameter: Parameter) -> None:
    """A parameter that is added or multiplied: its axis under the feature axis has one entry per feature."""
    axis = x.axis - x.rank + len(parameter.shape)
    if axis < 0 or not parameter.shape or parameter.shape[axis] == 1:
        return
    ctx.write(parameter, axis, x)


# Pooling and other operators that act on positions


@rule(
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.lp_pool1d, F.lp_pool2d, F.lp_pool3d, F.interpolate, F.upsample),
)
def resample(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Value:
    """Works within each channel."""
    if kwargs.get("return_indices"):
        raise ctx.error("it returns indices")
    if not isinstance(input, Features):
        return Plain()
    if input.axis != 1:
        raise ctx.error("its channels are not axis 1 of its input")
    return input.with_positions(*(None for _ in input.positions))


@module_rule(
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d),
    *(nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d),
)
def resample_module(ctx: Context, module: nn.Module, x: Value) -> Value:
    return resample(ctx, x, return_indices=getattr(module, "return_indices", False))


@rule(
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
)
def adaptive_pool(ctx: Context, input: Value, output_size: Any, return_indices: bool = False) -> Value:
    pooled = resample(ctx, input, return_indices=return_indices)
    if not isinstance(pooled, Features):
        return pooled
    count = len(pooled.positions)
    sizes = tuple(output_size) if isinstance(output_size, Sequence) else (output_size,) * count
    return pooled.with_positions(*sizes)


@module_rule(
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
def adaptive_pool_module(ctx: Context, module: nn.AdaptiveAvgPool2d, x: Value) -> Value:
    return adaptive_pool(ctx, x, module.output_size)


@rule(F.pad)
def pad(ctx: Context, input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    """Padded positions change nothing; padded channels are features of their own, zero in every model."""
    if not isinstance(input, Features):
        return Plain()
    behind = len(input.positions)
    if len(pad) > 2 * (behind + 1):
        raise ctx.error("it pads an axis before the features")
    padded = input.with_positions(*(None for _ in input.positions))
    before, after = pad[2 * behind : 2 * behind + 2] or (0, 0)
    if not before and not after:
        return padded
    if before < 0 or after < 0 or mode != "constant" or input.repeat != 1:
        raise ctx.error("it pads the feature axis in a way that is not understood")
    return padded.with_ids(np.concatenate([ctx.fresh(before), input.ids, ctx.fresh(after)]))


@rule(torch.mean, torch.sum, torch.amax, torch.amin, torch.std, torch.var, "mean", "sum", "amax", "amin", "std", "var")
def reduce(ctx: Context, input: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    """Reduces positions; reducing the features themselves would mix them."""
    if not isinstance(input, Features):
        return Plain()
    axes = _axes(input, range(input.rank) if dim is None else dim)
    if input.axis in axes or 0 in axes:
        raise ctx.error(f"it reduces over axis {input.axis}, the features, or over the batch")
    return _drop(input, axes, keepdim)


def _axes(x: Features, dims: Any) -> set[int]:
    return {dim % x.rank for dim in ([dims] if isinstance(dims, int) else dims)}


def _drop(x: Features, axes: set[int], keep: bool) -> Features:
    if keep:
        return x.with_shape(*(1 if axis in axes else size for axis, size in enumerate(x.shape)))
    shape = (size for axis, size in enumerate(x.shape) if axis not in axes)
    return x.with_shape(*shape, axis=x.axis - sum(axis < x.axis for axis in axes))


# Concatenating, slicing, and moving axes


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(ctx: Context, tensors: Sequence[Value], dim: int = 0, **kwargs: Any) -> Value:
    """Along the features: one after the other. Along positions: the same features of all, tied."""
    dim = kwargs.get("axis", dim)
    features = [value for value in tensors if isinstance(value, Features)]
    if not features:
        return Plain()
    first = features[0]
    if len(features) < len(tensors) or any(value.axis != first.axis for value in features):
        raise ctx.error("it concatenates tensors with and without features, or with features on different axes")
    if dim % first.rank != first.axis:
        for value in features[1:]:
            ctx.tie(first.ids, value.ids)
        return first.with_shape(*(None if axis == dim % first.rank else size for axis, size in enumerate(first.shape)))
    if any(value.repeat != first.repeat for value in features):
        if any(value.repeat is None for value in features):
            raise ctx.error(
                "it concatenates flattened tensors of unknown sizes; pass `example_input`", UnknownShapeError
            )
        first = Features(first.entries(), first.axis, first.shape)
        return first.with_ids(np.concatenate([value.entries() for value in features]))
    return first.with_ids(np.concatenate([value.ids for value in features]))


@rule(torch.chunk, torch.Tensor.chunk, "chunk")
def chunk(ctx: Context, input: Value, chunks: int, dim: int = 0) -> Any:
    if not isinstance(input, Features):
        return (Plain(),) * chunks
    if dim % input.rank != input.axis:
        return (input.with_positions(*(None for _ in input.positions)),) * chunks
    size = math.ceil(len(input.ids) / chunks)
    return split(ctx, input, size, dim)


@rule(torch.split, torch.Tensor.split, "split")
def split(ctx: Context, tensor: Value, split_size_or_sections: Any, dim: int = 0) -> Any:
    if not isinstance(tensor, Features) or dim % tensor.rank != tensor.axis or tensor.repeat != 1:
        raise ctx.error("only a split of the feature axis is understood")
    sizes = split_size_or_sections
    if isinstance(sizes, int):
        sizes = [sizes] * math.ceil(len(tensor.ids) / sizes)
    bounds = np.cumsum(sizes)[:-1].tolist()
    return tuple(tensor.with_ids(ids) for ids in np.split(tensor.ids, bounds))


@rule(operator.getitem)
def getitem(ctx: Context, container: Any, index: Any) -> Any:
    """An item of a tuple or size; of a tensor: slices, new axes, and single positions."""
    if isinstance(container, Plain):
        return Plain()
    if not isinstance(container, Features):
        return container[index] if container is not None else None
    index = index if isinstance(index, tuple) else (index,)
    taken = sum(item is not None and item is not Ellipsis for item in index)
    rest = (slice(None),) * (container.rank - taken)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *rest, *index[at + 1 :])
    else:
        index = (*index, *rest)
    axis, feature_axis, output = 0, -1, container
    shape: list[Dim] = []
    for item in index:
        if item is None:
            shape.append(1)
            continue
        if axis == container.axis:
            if not isinstance(item, slice) or container.repeat != 1:
                raise ctx.error("it picks single features by their number")
            output = output.with_ids(container.ids[item])
            feature_axis = len(shape)
            shape.append(len(output.ids))
        elif isinstance(item, slice):
            shape.append(container.shape[axis] if item == slice(None) else None)
        elif not isinstance(item, int):
            raise ctx.error("it indexes with a tensor")
        axis += 1
    return output.with_shape(*shape, axis=feature_axis)


@rule(torch.permute, torch.Tensor.permute, "permute")
def permute(ctx: Context, input: Value, *dims: Any) -> Value:
    if not isinstance(input, Features):
        return Plain()
    order = [dim % input.rank for dim in (dims[0] if isinstance(dims[0], (tuple, list)) else dims)]
    return input.with_shape(*(input.shape[dim] for dim in order), axis=order.index(input.axis))


@rule(torch.transpose, torch.Tensor.transpose, "transpose", "swapaxes")
def transpose(ctx: Context, input: Value, dim0: int, dim1: int) -> Value:
    if not isinstance(input, Features):
        return Plain()
    order = list(range(input.rank))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(ctx, input, order)


@rule(torch.unsqueeze, torch.Tensor.unsqueeze, "unsqueeze")
def unsqueeze(ctx: Context, input: Value, dim: int) -> Value:
    if not isinstance(input, Features):
        return Plain()
    dim %= input.rank + 1
    return input.with_shape(*input.shape[:dim], 1, *input.shape[dim:], axis=input.axis + (dim <= input.axis))


@rule(torch.squeeze, torch.Tensor.squeeze, "squeeze")
def squeeze(ctx: Context, input: Value, dim: Any = None) -> Value:
    if not isinstance(input, Features):
        return Plain()
    if dim is None and None in input.positions:
        raise ctx.error(
            "which axes it drops depends on the input: name its `dim`, or pass `example_input`", UnknownShapeError
        )
    ones = {axis for axis, size in enumerate(input.shape) if size == 1} if dim is None else _axes(input, dim)
    return _drop(input, ones - {input.axis}, keep=False)


# Sizes and reshapes


@rule("size", getattr)
def size(ctx: Context, input: Value, dim: Any = None) -> Any:
    if isinstance(dim, str) and dim != "shape":
        return {"ndim": len(input.shape or ())}.get(dim)
    if dim == "shape":
        dim = None
    if input.shape is None:
        return (BATCH,) + (None,) * 7 if dim is None else (BATCH if dim == 0 else None)
    return input.shape if dim is None else input.shape[dim]


@rule("dim", "numel", "ndimension")
def rank(ctx: Context, input: Value) -> Any:
    return None


@rule(torch._assert)
def assertion(ctx: Context, *args: Any) -> None:
    return None


@rule(torch.flatten, torch.Tensor.flatten, "flatten")
def flatten(ctx: Context, input: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    if not isinstance(input, Features):
        return Plain()
    start, end = start_dim % input.rank, end_dim % input.rank
    merged = -1 if end > start else input.shape[start]
    return reshape(ctx, input, *input.shape[:start], merged, *input.shape[end + 1 :])


@module_rule(nn.Flatten)
def flatten_module(ctx: Context, module: nn.Flatten, x: Value) -> Value:
    return flatten(ctx, x, module.start_dim, module.end_dim)


@rule("view", "reshape", torch.reshape, torch.Tensor.reshape)
def reshape(ctx: Context, input: Value, *shape: Any) -> Value:
    """Keeps the feature axis, or joins it with the positions behind it: C blocks of H·W."""
    if not isinstance(input, Features):
        return Plain()
    target = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    axis, extent = input.axis, input.shape[input.axis]
    positions = product(input.positions)
    if len(target) > axis and all(_same(*pair) for pair in zip(target[:axis], input.shape[:axis], strict=True)):
        last = len(target) == axis + 1
        kept = target[axis] == extent is not None or (target[axis] == -1 and not last)
        if last and positions == 1:
            kept = True
        if kept and target[0] == -1 and not positions and last:
            raise ctx.error(
                "whether it mixes channels into the batch depends on the input's size: keep the batch with "
                "`x.flatten(1)`, or pass `example_input`",
                UnknownShapeError,
            )
        if kept:
            return input.with_shape(*input.shape[:axis], extent, *_sizes(target[axis + 1 :]))
        joined = target[axis]
        count = len(input.ids)
        if last and (joined in (-1, None) or (isinstance(joined, int) and joined % count == 0)):
            repeat = input.repeat * positions if input.repeat and positions else None
            if isinstance(joined, int) and joined > 0:
                if repeat not in (None, joined // count):
                    raise ctx.error(f"it reshapes {tuple(input.shape)} to {target}")
                repeat = joined // count
            total = count * repeat if repeat else None
            return Features(input.ids, axis, (*input.shape[:axis], total), repeat)
    raise ctx.error(f"a reshape from {_show(input.shape)} to {_show(target)} does not keep axis {axis}, its channels")


def _same(asked: Any, known: Dim) -> bool:
    """Whether the reshape keeps this size; one that depends on the input is taken to be the batch's."""
    return asked is known or asked == known or asked == -1 or (asked is None and known is BATCH)


def _sizes(sizes: Sequence[Any]) -> tuple[Dim, ...]:
    return tuple(size if isinstance(size, int) and size >= 0 else None for size in sizes)


def _show(shape: Sequence[Any]) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in shape)})"


POOLING = {
    *(unchanged, unchanged_module, adaptive_pool, adaptive_pool_module, resample, resample_module, reduce),
    *(flatten, flatten_module, reshape, squeeze),
}
"""Rules of operators that may stand between the positions of a feature and a layer that reads their average."""
