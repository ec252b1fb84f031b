"""Concatenating, slicing, reshaping and moving axes: index maps on the features."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from lightning_zipit.graph.align import broadcast_all
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Trait, module_rule, rule
from lightning_zipit.graph.values import Features, Joined, Parameter, Plain, Value


@rule(
    *(torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose),
    *(torch.swapaxes, torch.swapdims, torch.movedim, torch.t, torch.chunk, torch.split, torch.split_with_sizes),
    *(torch.unbind, torch.select, torch.narrow, torch.index_select, torch.tile, torch.roll, torch.flip),
    *(torch.broadcast_to, torch.Tensor.reshape, torch.Tensor.view, torch.Tensor.flatten, torch.Tensor.permute),
    *(torch.Tensor.transpose, torch.Tensor.chunk, torch.Tensor.split, torch.Tensor.unbind, torch.Tensor.expand),
    *("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "swapaxes"),
    *("swapdims", "movedim", "t", "chunk", "split", "split_with_sizes", "unbind", "select", "narrow", "index_select"),
    *("expand", "expand_as", "broadcast_to", "reshape_as", "view_as", "repeat", "tile", "roll", "flip"),
    traits=Trait.REARRANGE | Trait.VIEW,
)
def rearrange(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Any:
    """Entries go elsewhere and none is changed: the operator itself is run, on the numbers of the features."""
    if isinstance(input, Plain):
        return Plain()

    others, named = fx.map_arg((ctx.node.args[1:], ctx.node.kwargs), ctx.concrete)
    named = {name: value for name, value in named.items() if name in kwargs}

    def call(numbers: Tensor) -> Any:
        try:
            return _operator(ctx)(numbers, *others, **named)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ctx.error(f"its features cannot be followed ({error})") from error

    return _views(ctx, input, call) if isinstance(input, Parameter) else _moved(ctx, input, call)


def _operator(ctx: Context) -> Callable[..., Any]:
    target = ctx.node.target
    if ctx.node.op == "call_method":
        return getattr(Tensor, {"view": "reshape", "view_as": "reshape_as"}.get(str(target), str(target)))
    return ctx.module.get_submodule(str(target)) if ctx.node.op == "call_module" else target  # type: ignore[return-value]


def _moved(ctx: Context, x: Features, call: Any) -> Any:
    spread = torch.from_numpy(x.ids.reshape([size if axis in x.axes else 1 for axis, size in enumerate(x.shape)]))
    moved = call(spread.expand(x.shape))
    if isinstance(moved, Tensor):
        return _features(ctx, x, moved)
    return tuple(_features(ctx, x, part) for part in moved)


def _features(ctx: Context, x: Features, entries: Tensor) -> Features:
    """The axes along which the numbers differ hold the features."""
    axes = tuple(axis for axis in range(entries.ndim) if (entries != entries.narrow(axis, 0, 1)).any())
    if not axes:  # a single feature: it stays on its axis, or goes to another that has one entry
        single = [axis for axis, size in enumerate(entries.shape) if axis and size == 1]
        if x.ids.size > 1 and x.axes[0] not in single:
            raise ctx.error("it picks a single feature by its number")
        axes = (x.axes[0] if x.axes[0] in single else (single or [entries.ndim - 1])[-1],)
    ids = entries[tuple(slice(None) if axis in axes else 0 for axis in range(entries.ndim))]
    return Features(ids.contiguous().numpy(), axes, tuple(entries.shape))


def _views(ctx: Context, parameter: Parameter, call: Any) -> Any:
    """Number each axis of a parameter by itself, and see which axis of the result has the numbers in order."""
    numbered = []
    for axis, size in enumerate(parameter.shape):
        ordinals = torch.arange(size).reshape([size if other == axis else 1 for other in range(len(parameter.shape))])
        numbered.append(call(ordinals.expand(parameter.shape)))
    if numbered and not isinstance(numbered[0], Tensor):
        return tuple(_view(parameter, list(parts)) for parts in zip(*numbered, strict=True))
    return _view(parameter, numbered)


def _view(parameter: Parameter, numbered: list[Tensor]) -> Parameter:
    shape = tuple(numbered[0].shape)
    axes: list[int | None] = [None] * len(shape)
    for source, (numbers, size) in enumerate(zip(numbered, parameter.shape, strict=True)):
        for axis in range(numbers.ndim):
            ordinals = torch.arange(size).reshape([-1 if other == axis else 1 for other in range(numbers.ndim)])
            if size > 1 and numbers.shape[axis] == size and (numbers == ordinals).all():
                axes[axis] = parameter.axes[source]
    return replace(parameter, shape=shape, axes=tuple(axes))


@module_rule(nn.Flatten, nn.Unflatten, "torchvision.ops.misc.Permute", traits=Trait.REARRANGE | Trait.VIEW)
def rearrange_module(ctx: Context, module: nn.Module, x: Value) -> Any:
    return rearrange(ctx, x)


@rule(operator.getitem, traits=Trait.REARRANGE | Trait.VIEW)
def getitem(ctx: Context, container: Any, index: Any) -> Any:
    """An item of a tuple or a size; of a tensor, entries of some axes."""
    if isinstance(container, (Features, Parameter, Plain)):
        return rearrange(ctx, container, index)
    return None if container is None else container[index]


@rule(torch.cat, torch.concat, torch.concatenate, traits=Trait.REARRANGE)
def cat(ctx: Context, tensors: Sequence[Any], dim: int = 0, **kwargs: Any) -> Any:
    """Along the features: one after the other. Along positions: the same features of all, tied."""
    dim = kwargs.get("axis", dim)
    features = [value for value in tensors if isinstance(value, Features)]
    if dim == 0 and all(isinstance(value, Parameter) and len(value.shape) == 1 for value in tensors):
        return Joined(tuple(tensors))
    if not features:
        return Plain()
    first = features[0]
    if any(value.axes != first.axes for value in features):
        raise ctx.error("it concatenates tensors with features on different axes")
    if dim % first.rank not in first.axes:
        return broadcast_all(ctx, tensors)
    if len(features) < len(tensors):
        raise ctx.error("it concatenates tensors with and without features")
    return Features(np.concatenate([value.ids for value in features], first.axes.index(dim % first.rank)), first.axes)


@rule(torch.stack)
def stack(ctx: Context, tensors: Sequence[Value], dim: int = 0) -> Value:
    """On a new axis: the same features of all, tied."""
    if not any(isinstance(value, Features) for value in tensors):
        return Plain()
    x = broadcast_all(ctx, tensors)
    dim %= x.rank + 1
    return Features(x.ids, tuple(axis + (axis >= dim) for axis in x.axes))


@rule("size", getattr, traits=Trait.SHAPE)
def size(ctx: Context, input: Value, dim: Any = None) -> Any:
    if isinstance(dim, str) and dim in ("T", "mT"):
        return rearrange(ctx, input, dim)
    if input.shape is None or dim not in (None, "shape", "ndim"):
        return input.shape[dim] if input.shape is not None and isinstance(dim, int) else None
    return len(input.shape) if dim == "ndim" else input.shape


@rule("dim", "ndimension", traits=Trait.SHAPE)
def rank(ctx: Context, input: Value) -> Any:
    return None if input.shape is None else len(input.shape)


@rule("numel", traits=Trait.SHAPE)
def numel(ctx: Context, input: Value) -> Any:
    return None if input.shape is None else int(np.prod(input.shape))
