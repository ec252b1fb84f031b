"""Rules of matrix products and einsum."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch

from lightning_zipit.graph.align import entrywise
from lightning_zipit.graph.contraction import contract
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Trait, rule, spellings
from lightning_zipit.graph.rules.symmetric import reduced
from lightning_zipit.graph.values import Features, Parameter, Plain, Value


@rule(torch.einsum, traits=Trait.LINEAR)
def einsum(ctx: Context, equation: str, *operands: Any, path: Any = None) -> Value:
    """Contract tensors: read features with a weight, or tie the features of two tensors."""
    values = list(operands[0]) if isinstance(operands[0], (tuple, list)) else list(operands)
    letters, output = _letters(ctx, equation, values)
    if len(values) == 1:
        values, letters = [*values, Plain(())], [*letters, ""]
    while len(values) > 1:
        needed = set(output).union(*letters[2:])
        kept = output if len(values) == 2 else "".join(sorted({*letters[0], *letters[1]} & needed))
        product = contract(ctx, (letters[0], letters[1]), kept, (values[0], values[1]))
        values, letters = [product, *values[2:]], [kept, *letters[2:]]
    return values[0]


def _letters(ctx: Context, equation: str, values: Sequence[Any]) -> tuple[list[str], str]:
    """Return a letter for each axis of each operand, and those of the output."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(values) or any(value.shape is None for value in values):
        raise ctx.error("it contracts tensors of unknown shape")
    named = sorted(name for name in set(inputs) if name.isalpha())
    if not arrow:
        output = "..." * ("..." in inputs) + "".join(name for name in named if inputs.count(name) == 1)
    free = [name for name in string.ascii_letters if name not in named]
    more = [len(value.shape) - len(term.replace("...", "")) for term, value in zip(terms, values, strict=True)]
    most = max((count for count, term in zip(more, terms, strict=True) if "..." in term), default=0)
    letters = [term.replace("...", "".join(free[most - count : most])) for count, term in zip(more, terms, strict=True)]
    return letters, output.replace("...", "".join(free[:most]))


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


@rule(*spellings("dot vdot inner"), traits=Trait.LINEAR)
def inner(ctx: Context, input: Value, other: Value) -> Value:
    """Contract the last axes of two tensors."""
    return einsum(ctx, "...x,...x->..." if _rank(other) == 1 else "...x,yx->...y", input, other)


@rule(*spellings("outer ger"), traits=Trait.LINEAR)
def outer(ctx: Context, input: Value, other: Value) -> Value:
    """Multiply each entry of one vector by each entry of another."""
    return einsum(ctx, "x,y->xy", input, other)


def _rank(value: Value) -> int:
    return len(value.shape or ())


@rule(torch.cdist)
def distances(ctx: Context, x1: Value, x2: Value, p: float = 2.0, compute_mode: Any = None) -> Value:
    """Compare rows of two tensors, whose last axes hold the same features."""
    if isinstance(x1, Parameter) or isinstance(x2, Parameter):
        raise ctx.error("it compares with a parameter, such as a table of codes, whose order differs between models")
    return einsum(ctx, "...px,...rx->...pr", x1, x2)


@rule(*spellings("pairwise_distance"), traits=Trait.SYMMETRIC)
def distance(ctx: Context, x1: Value, x2: Value, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Value:
    """Compare the last axes of two tensors, and tie their features."""
    return _compared(ctx, x1, x2, -1, keepdim)


@rule(*spellings("cosine_similarity"), traits=Trait.SYMMETRIC)
def similarity(ctx: Context, x1: Value, x2: Value, dim: int = 1, eps: float = 1e-8) -> Value:
    """Compare an axis of two tensors, and tie their features."""
    return _compared(ctx, x1, x2, dim, keepdim=False)


def _compared(ctx: Context, x1: Value, x2: Value, dim: int, keepdim: bool) -> Value:
    """Reduce an axis after an elementwise operator on two tensors."""
    both = entrywise(ctx, x1, x2)
    if not isinstance(both, Features):
        ctx.positional(x1, x2)
        return ctx.constant([])
    for value in (x1, x2):
        if isinstance(value, Features):
            ctx.observe(value)
    return reduced(ctx, both, dim, keepdim)


@rule(*spellings("addmm addmv baddbmm"), traits=Trait.LINEAR)
def sum_with_product(
    ctx: Context, input: Value, first: Value, second: Value, *, beta: float = 1, alpha: float = 1
) -> Value:
    """Add a tensor to a matrix product."""
    return entrywise(ctx, matmul(ctx, first, second), input)
