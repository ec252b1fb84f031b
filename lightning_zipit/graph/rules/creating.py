"""Rules of operators that create tensors from numbers: constants, grids, random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_zipit.graph.computed import broadcast_shape, with_axes
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Trait, rule, spellings
from lightning_zipit.graph.values import Features, Parameter, Plain, Value

CONSTANTS = "zeros ones full eye arange range linspace logspace scalar_tensor tril_indices triu_indices"
WINDOWS = "hann_window hamming_window blackman_window bartlett_window kaiser_window"
RANDOM = "rand randn randint randperm normal rand_like randn_like randint_like empty empty_like empty_strided"


@rule(*spellings(f"{CONSTANTS} {WINDOWS}"), traits=Trait.SHAPE)
def constant(ctx: Context, *args: Any, **kwargs: Any) -> Value:
    """Create a tensor from numbers."""
    if any(isinstance(value, Features) for value in (*args, *kwargs.values())):
        raise ctx.error("it creates a tensor from features")
    return ctx.constant([])


@rule(*spellings(RANDOM))
def random(ctx: Context, *args: Any, **kwargs: Any) -> Value:
    """Create a tensor of random numbers, of which only the shape follows from the input."""
    ctx.positional(args)
    return ctx.constant([])


@rule(torch.meshgrid)
def grid(ctx: Context, *tensors: Any, indexing: str = "ij") -> Any:
    """Create coordinates from tensors without features."""
    given = tensors[0] if isinstance(tensors[0], (tuple, list)) else tensors
    if not all(isinstance(value, Plain) for value in given):
        raise ctx.error("it makes a grid of features or parameters")
    return tuple(Plain() for _ in given)


@rule(torch.broadcast_tensors, traits=Trait.REARRANGE)
def broadcast_tensors(ctx: Context, *tensors: Any) -> Any:
    """Expand tensors to one shape, each with its own features."""
    given: Sequence[Value] = tensors[0] if isinstance(tensors[0], (tuple, list)) else tensors
    shapes = [value.shape for value in given if value.shape is not None]
    if len(shapes) < len(given):
        raise ctx.error("it broadcasts tensors of unknown shape")
    shape = broadcast_shape(shapes)
    return tuple(_widened(ctx, value, shape) for value in given)


def _widened(ctx: Context, value: Value, shape: tuple[int, ...]) -> Value:
    more = len(shape) - len(value.shape or ())
    if isinstance(value, Features):
        if any(value.shape[axis] != shape[axis + more] for axis in value.axes):
            raise ctx.error("it broadcasts one feature over several")
        return Features(value.ids, tuple(axis + more for axis in value.axes), shape)
    if isinstance(value, Parameter) and value.counts:
        shown = [None] * more + [
            axis if value.shape[axis] == shape[axis + more] else None for axis in range(value.rank)
        ]
        return with_axes(value, shape, shown)
    single = [axis for axis in range(len(shape)) if axis < more or (value.shape or ())[axis - more] == 1]
    known = value.alike if isinstance(value, Plain) else ()
    return Plain(shape, tuple({*single, *(axis + more for axis in known)}))
