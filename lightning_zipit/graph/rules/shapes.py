"""Rules of reshaping, indexing, concatenation and size queries: index maps on features."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from lightning_zipit.graph.align import broadcast_all, entrywise
from lightning_zipit.graph.computed import as_features, combined, computed, with_axes
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.naming import operator_name
from lightning_zipit.graph.registry import Trait, module_rule, rule, spellings
from lightning_zipit.graph.rules.positions import within
from lightning_zipit.graph.values import Features, Parameter, Plain, Shape, Value, concatenated, leaves, no_entries

REARRANGEMENTS = (
    "reshape flatten ravel unflatten squeeze unsqueeze permute transpose swapaxes swapdims movedim moveaxis t chunk "
    "split split_with_sizes tensor_split unbind select narrow index_select view view_as reshape_as expand expand_as "
    "broadcast_to repeat tile repeat_interleave roll flip rot90 pixel_shuffle pixel_unshuffle channel_shuffle "
    "diagonal unsafe_chunk unsafe_split"
)
LIKE_ANOTHER = ("view_as", "reshape_as", "expand_as")
"""Methods that read only the shape of their second tensor."""
EXPANDING = ("expand", "expand_as", "broadcast_to", "repeat", "tile")
"""Operators that repeat an axis of size 1."""
MOVING = Trait.REARRANGE | Trait.VIEW


@rule(*spellings(REARRANGEMENTS), "unfold", traits=MOVING)
def rearrange(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Any:
    """Move entries without changing them: the operator itself runs on feature indices."""
    if operator_name(ctx.node) in LIKE_ANOTHER:
        ctx.positional(args, kwargs)
    elif any(isinstance(value, Features) for value in leaves((args, kwargs))):
        raise ctx.error("it selects entries by the values of features")
    if isinstance(input, Plain):
        return _expanded(ctx, input) if operator_name(ctx.node) in EXPANDING else ctx.constant([input])
    return _views(ctx, input) if isinstance(input, Parameter) else _moved(ctx, input)


def _expanded(ctx: Context, input: Plain) -> Any:
    """Record that all entries along an axis of size 1 become the same along a longer axis."""
    shape = ctx.shapes.get(ctx.node.name)
    if shape is None or input.shape is None:
        return ctx.constant([input])
    before = (1,) * (len(shape) - len(input.shape)) + input.shape
    return Plain(shape, tuple(axis for axis, size in enumerate(before) if size == 1))


def _call(ctx: Context, numbers: Tensor, unknown: int) -> Any:
    """Run the current operator on indices. ``unknown`` replaces the entries of arguments that depend on data."""
    others, named = fx.map_arg((ctx.node.args[1:], ctx.node.kwargs), lambda node: ctx.concrete(node, unknown))
    named = {name: value for name, value in named.items() if ctx.node.args or name not in ("input", "x", "a", "self")}
    try:
        return _operator(ctx)(numbers, *others, **named)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise ctx.error(f"its features cannot be traced ({error})") from error


def _open_indices(ctx: Context) -> bool:
    """Whether the current operator selects entries by data."""
    tensors = [node for node in ctx.node.all_input_nodes[1:] if isinstance(ctx.values[node], (Plain, Parameter))]
    return operator_name(ctx.node) not in LIKE_ANOTHER and not all(map(ctx.known, tensors))


def _operator(ctx: Context) -> Callable[..., Any]:
    target = ctx.node.target
    if ctx.node.op == "call_method":
        return getattr(Tensor, {"view": "reshape", "view_as": "reshape_as"}.get(str(target), str(target)))
    return ctx.module.get_submodule(str(target)) if ctx.node.op == "call_module" else target  # type: ignore[return-value]


def _moved(ctx: Context, x: Features) -> Any:
    features = torch.from_numpy(x.ids.reshape([size if axis in x.axes else 1 for axis, size in enumerate(x.shape)]))
    others = torch.arange(math.prod(x.shape) // x.ids.size, dtype=torch.int32)
    others = others.reshape([1 if axis in x.axes else size for axis, size in enumerate(x.shape)])
    moved, places = (_call(ctx, numbers.expand(x.shape), 0) for numbers in (features, others))
    if _open_indices(ctx) and not torch.equal(moved, _call(ctx, features.expand(x.shape), 1)):
        raise ctx.error("it selects features by data")
    if isinstance(moved, Tensor):
        found = _features(ctx, x, moved, places)
        return replace(found, alike=_repeated(x.shape, found)) if operator_name(ctx.node) in EXPANDING else found
    return tuple(_features(ctx, x, part, own) for part, own in zip(moved, places, strict=True))


def _repeated(before: Shape, x: Features) -> tuple[int, ...]:
    """Return the axes of positions that had size 1 before an operator repeated them."""
    sizes = (1,) * (x.rank - len(before)) + before
    return tuple(axis for axis, size in enumerate(sizes) if size == 1 and axis not in x.axes)


def _features(ctx: Context, x: Features, entries: Tensor, places: Tensor) -> Features:
    """Find the axes that hold features: those along which feature indices differ.

    Args:
        ctx: the context.
        x: the input of the operator.
        entries: the feature of each entry of the output.
        places: the sample and the position that each entry comes from.
    """
    axes = tuple(axis for axis in range(entries.ndim) if (entries != entries.narrow(axis, 0, 1)).any())
    if not axes:  # a single feature stays on its axis, or moves to another axis of size 1
        single = [axis for axis, size in enumerate(entries.shape) if axis and size == 1]
        if x.ids.size > 1 and x.axes[0] not in single:
            raise ctx.error("it selects a single feature by its index")
        axes = (x.axes[0] if x.axes[0] in single else (single or [entries.ndim - 1])[-1],)
    ids = entries[tuple(slice(None) if axis in axes else 0 for axis in range(entries.ndim))].contiguous()
    if not _alike(ids.flatten(), places.movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1)):
        raise ctx.error("it selects different positions of different features")
    return Features(ids.numpy(), axes, tuple(entries.shape))


def _alike(ids: Tensor, places: Tensor) -> bool:
    """Whether all features with the same number of entries come from the same places, in the same order."""
    if (places == places[:1]).all():
        return True
    order = ids.argsort(stable=True)
    _, counts = ids[order].unique_consecutive(return_counts=True)
    of_each = places[order].split(counts.tolist())
    first = {len(part): part for part in reversed(of_each)}
    return all(torch.equal(part, first[len(part)]) for part in of_each)


def _views(ctx: Context, parameter: Parameter) -> Any:
    """Trace each axis of a parameter through the operator, by running it on indices along that axis."""
    numbered = _numbered(ctx, parameter, 0)
    if numbered and not isinstance(numbered[0], Tensor):
        return tuple(_view(parameter, list(parts)) for parts in zip(*numbered, strict=True))
    if not (parameter.counts and _open_indices(ctx)):
        return _view(parameter, numbered)
    again = _numbered(ctx, parameter, 1)  # axes that data selects from show no entries
    same = [numbers if torch.equal(numbers, other) else None for numbers, other in zip(numbered, again, strict=True)]
    return _looked_up(ctx, _view(parameter, same, tuple(numbered[0].shape)))


def _numbered(ctx: Context, parameter: Parameter, unknown: int) -> list[Any]:
    """Run the operator on the indices along each axis of a parameter."""
    numbered = []
    for axis, size in enumerate(parameter.shape):
        ordinals = torch.arange(size).reshape([size if other == axis else 1 for other in range(parameter.rank)])
        numbered.append(_call(ctx, ordinals.expand(parameter.shape), unknown))
    return numbered


def _looked_up(ctx: Context, view: Parameter) -> Features:
    """Write new features by a lookup of a parameter's rows with data-dependent indices, like an embedding."""
    shown = [axis for axis in range(view.rank) if view.along(axis) is not None]
    if len(shown) != 1:
        raise ctx.error(f"it selects single entries of `{view.name}` by data")
    return as_features(ctx, view, shown[0])


def _view(parameter: Parameter, numbered: list[Any], shape: Shape | None = None) -> Parameter:
    """Return a view of a parameter, from the indices along each of its axes.

    Where several axes become one, it shows the larger of the first two. All others, such as those of a kernel, are
    positions.
    """
    shape = tuple(numbered[0].shape) if shape is None else shape
    found: list[tuple[int, Any] | None] = [None] * len(shape)
    for source in sorted(range(parameter.rank), key=lambda source: (source < 2, parameter.shape[source])):
        for axis in range(len(shape)) if numbered[source] is not None and parameter.shape[source] > 1 else ():
            numbers = numbered[source]
            row = numbers.movedim(axis, 0).reshape(numbers.shape[axis], -1)[:, 0]
            alone = (numbers == row.reshape([-1 if other == axis else 1 for other in range(len(shape))])).all()
            if alone and len(row) > 1 and (row != row[0]).any():
                found[axis] = source, row.numpy()
    if all(each is None or _in_full(parameter, *each) for each in found) and not parameter.entries:
        axes = tuple(None if each is None else parameter.axes[each[0]] for each in found)
        return replace(parameter, shape=shape, axes=axes)
    along = [each and (parameter.along(each[0]), each[1]) for each in found]
    return computed([parameter], shape, [each[0].take(each[1]) if each and each[0] else None for each in along])


def _in_full(parameter: Parameter, source: int, row: Any) -> bool:
    return len(row) == parameter.shape[source] and (row == np.arange(len(row))).all()


@module_rule(
    *(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    "torchvision.ops.misc.Permute",
    traits=MOVING,
)
def rearrange_module(ctx: Context, module: nn.Module, input: Value) -> Any:
    """Move entries without changing them: the operator itself runs on feature indices."""
    return rearrange(ctx, input)


@rule(operator.getitem, "__getitem__", traits=MOVING)
def getitem(ctx: Context, container: Any, index: Any) -> Any:
    """Select an item of a tuple or a size, or entries of a tensor."""
    if isinstance(container, (Features, Parameter, Plain)):
        return rearrange(ctx, container, index)
    return None if container is None else container[index]


@rule(torch.cat, torch.concat, torch.concatenate, traits=Trait.REARRANGE)
def cat(ctx: Context, tensors: Sequence[Any], dim: int = 0) -> Any:
    """Concatenate features along a feature axis, and tie the features of its inputs along a position axis."""
    features = [value for value in tensors if isinstance(value, Features)]
    parameters = [value for value in tensors if isinstance(value, Parameter) and value.counts]
    if not features and not parameters:
        return ctx.constant(list(tensors))
    if features and dim == 0 and len(features) == len(tensors) and _are_states(features):
        return Features(np.stack([value.ids for value in features]), (0, *features[0].axes))
    if any(value.axes != features[0].axes for value in features):
        tensors = [_along(value, dim % value.rank) if isinstance(value, Features) else value for value in tensors]
        features = [value for value in tensors if isinstance(value, Features)]
    if any(value.axes != features[0].axes for value in features):
        raise ctx.error("it concatenates tensors with features on different axes")
    if features and dim % features[0].rank in features[0].axes:
        return _side_by_side(ctx, tensors, features[0].axes, dim % features[0].rank)
    if not features and (len(parameters) == len(tensors) or not _varies(ctx, tensors)):
        return _joined(ctx, tensors, parameters, dim % parameters[0].rank)
    for parameter in parameters:
        if parameter.shape[dim] > 1:
            raise ctx.error(f"`{parameter.name}` has several entries along the concatenated axis")
    return entrywise(ctx, *tensors)


def _along(x: Features, dim: int) -> Features:
    """The same with features along one more axis: there, all entries are of one feature."""
    if dim in x.axes:
        return x
    axes = tuple(sorted((*x.axes, dim)))
    at = axes.index(dim)
    return Features(np.repeat(np.expand_dims(x.ids, at), x.shape[dim], at), axes, x.shape)


def _are_states(tensors: Sequence[Features]) -> bool:
    """Whether tensors are the last states of several recurrent layers, ``(1, samples, units)``."""
    first = tensors[0]
    alike = all(value.shape == first.shape and value.axes == first.axes == (2,) for value in tensors)
    return alike and first.rank == 3 and first.shape[0] == 1


def _varies(ctx: Context, tensors: Sequence[Any]) -> bool:
    """Whether some of the concatenated tensors depend on data."""
    (nodes,) = [argument for argument in ctx.node.args[:1] if isinstance(argument, (list, tuple))] or [()]
    return len(nodes) != len(tensors) or not all(
        isinstance(value, Parameter) or ctx.known(node) for node, value in zip(nodes, tensors, strict=True)
    )


def _joined(ctx: Context, tensors: Sequence[Any], parameters: Sequence[Parameter], dim: int) -> Parameter:
    """Concatenate parameters, and constants."""
    shape = ctx.shapes[ctx.node.name]
    others = combined([with_axes(each, _without(each.shape, dim), _but(each.rank, dim)) for each in parameters])
    entries = [others.along(axis) for axis in range(len(shape))]
    along = [
        value.along(dim) if isinstance(value, Parameter) and value.counts else no_entries(value.shape[dim])
        for value in tensors
    ]
    known = [each for each in along if each is not None]
    entries[dim] = concatenated(known) if len(known) == len(along) else None
    return computed(parameters, shape, entries)


def _without(shape: Shape, dim: int) -> Shape:
    return tuple(1 if axis == dim else size for axis, size in enumerate(shape))


def _but(rank: int, dim: int) -> list[int | None]:
    return [None if axis == dim else axis for axis in range(rank)]


def _side_by_side(ctx: Context, tensors: Sequence[Any], axes: tuple[int, ...], dim: int) -> Features:
    parts = []
    for value in tensors:
        if not isinstance(value, Features):
            if len(axes) > 1 or value.shape is None:
                raise ctx.error("it concatenates tensors with and without features")
            made = ctx.fresh(value.shape[dim])
            if isinstance(value, Parameter) and value.counts:
                ctx.write(value, dim, made)
            else:
                ctx.pin(made, f"`{ctx.node.name}` concatenates features with a tensor without features")
        parts.append(value.ids if isinstance(value, Features) else made)
    return Features(np.concatenate(parts, axes.index(dim)), axes)


@rule(torch.stack, traits=Trait.REARRANGE)
def stack(ctx: Context, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Stack tensors on a new axis, and tie their features."""
    if not any(isinstance(value, Features) for value in tensors):
        return ctx.constant(list(tensors))
    x = broadcast_all(ctx, tensors)
    dim %= x.rank + 1
    return Features(x.ids, tuple(axis + (axis >= dim) for axis in x.axes))


@rule(*spellings("view_as_complex"), traits=MOVING)
def as_complex(ctx: Context, input: Value) -> Value:
    """Combine the two entries of the last axis, whose order is fixed, such as a pair of a rotary embedding."""
    return within(ctx, input, -1) if isinstance(input, Features) else ctx.constant([input])


@rule(*spellings("view_as_real"), traits=MOVING)
def as_real(ctx: Context, input: Value) -> Value:
    """Split numbers into two positions on a new last axis."""
    return Features(input.ids, input.axes) if isinstance(input, Features) else ctx.constant([input])


@rule(*spellings("glu"))
def gated(ctx: Context, input: Value, dim: int = -1) -> Value:
    """Multiply one half of an axis by a gate computed from the other half, and tie the features of both."""
    if not isinstance(input, Features):
        return ctx.constant([input])
    dim %= input.rank
    if dim not in input.axes:
        return Features(input.ids, input.axes)
    first, second = np.split(input.ids, 2, input.axes.index(dim))
    ctx.tie(first, second)
    return Features(first, input.axes)


@module_rule(nn.GLU)
def gated_module(ctx: Context, module: nn.GLU, input: Value) -> Value:
    """Multiply one half of an axis by a gate computed from the other half, and tie the features of both."""
    return gated(ctx, input, module.dim)


# Sizes and other properties


@rule("size", traits=Trait.SHAPE)
def size(ctx: Context, input: Value, dim: int | None = None) -> Any:
    """Return sizes."""
    return input.shape if input.shape is None or dim is None else input.shape[dim]


@rule(*spellings("dim ndimension"), traits=Trait.SHAPE)
def rank(ctx: Context, input: Value) -> Any:
    """Return the number of axes."""
    return None if input.shape is None else len(input.shape)


@rule(*spellings("numel"), traits=Trait.SHAPE)
def numel(ctx: Context, input: Value) -> Any:
    """Return the number of entries."""
    return None if input.shape is None else int(np.prod(input.shape))


@rule(*spellings("is_floating_point is_complex is_contiguous get_device stride"), traits=Trait.SHAPE)
def unknown(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> None:
    """Return a property that does not affect features."""


ATTRIBUTES: dict[str, Callable[..., Any]] = {"shape": size, "ndim": rank}
"""Attributes of a tensor that do not depend on data."""


@rule(getattr, traits=Trait.SHAPE | Trait.VIEW)
def attribute(ctx: Context, input: Any, name: str) -> Any:
    """Return an attribute of a tensor, such as its shape or its transpose."""
    if name in ATTRIBUTES:
        return ATTRIBUTES[name](ctx, input)
    if ctx.node.name not in ctx.shapes:
        return None
    if name in ("data", "real"):
        return input
    return rearrange(ctx, input)


@rule(torch._assert)
def assertion(ctx: Context, *args: Any, **kwargs: Any) -> None:
    """Check a condition, and return nothing."""
