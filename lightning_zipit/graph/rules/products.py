"""Rules of matrix products and einsum."""

from __future__ import annotations

import string
from typing import Any

import torch

from lightning_zipit.graph.align import entrywise
from lightning_zipit.graph.contraction import contract
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Trait, rule, spellings
from lightning_zipit.graph.values import Plain, Value


@rule(torch.einsum, traits=Trait.LINEAR)
def einsum(ctx: Context, equation: str, *operands: Any) -> Value:
    """Contract two tensors: read features with a weight, or tie the features of both."""
    operands = tuple(operands[0]) if isinstance(operands[0], (tuple, list)) else operands
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if len(operands) == 1:
        operands, letters = (*operands, Plain(())), [*letters, ""]
    if len(operands) != 2 or "." in equation or not arrow:
        raise ctx.error("only an einsum of two tensors with an explicit output (`->`) and no dots is supported")
    return contract(ctx, (letters[0], letters[1]), output, (operands[0], operands[1]))


@rule(*spellings("matmul bmm mm mv"), "__matmul__", traits=Trait.LINEAR)
def matmul(ctx: Context, input: Value, other: Value) -> Value:
    """Contract two tensors: read features with a weight, or tie the features of both."""
    if input.shape is None or other.shape is None:
        raise ctx.error("it multiplies by a tensor of unknown shape")
    return product(ctx, input, other)


def product(ctx: Context, input: Value, other: Value) -> Value:
    """Record a matrix product, either side of which may be a vector."""
    left, right = len(input.shape or ()), len(other.shape or ())
    batch = string.ascii_lowercase[: max(left, right, 2) - 2]
    first = batch[len(batch) + 2 - left :] + "XY" if left > 1 else "Y"
    second = batch[len(batch) + 2 - right :] + "YZ" if right > 1 else "Y"
    return contract(ctx, (first, second), batch + "X" * (left > 1) + "Z" * (right > 1), (input, other))


@rule(*spellings("addmm addmv baddbmm"), traits=Trait.LINEAR)
def sum_with_product(
    ctx: Context, input: Value, first: Value, second: Value, *, beta: float = 1, alpha: float = 1
) -> Value:
    """Add a tensor to a matrix product."""
    return entrywise(ctx, matmul(ctx, first, second), input)
