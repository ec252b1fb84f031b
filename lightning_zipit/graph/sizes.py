"""Which sizes of its inputs a captured network takes: those that are free, and the conditions on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from lightning_zipit.errors import TraceError

Size: TypeAlias = Any
"""A whole number where a size is fixed; else a symbol of sympy, or an expression of the symbols of others."""

LONGEST = 6
"""Operations in the expression of a size from which on torch.export takes minutes, as windows with padding have."""


class TooManyOperationsError(Exception):
    """A size is too long an expression of the sizes of the input."""


class ShortExpressions(TorchFunctionMode):
    """Inside, sizes stay short expressions, or :class:`TooManyOperationsError` is raised."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in args[:1]:
            for size in value.shape if isinstance(value, Tensor) else ():
                if isinstance(size, torch.SymInt) and size.node.expr.count_ops() > LONGEST:
                    raise TooManyOperationsError(str(size.node.expr))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Sizes:
    """The sizes that a captured network takes.

    Attributes:
        names: what the inputs are called.
        inputs: the size of each axis of each input.
        conditions: what must be true of the symbols.
        single: whether a batch of one sample, which torch.export never allows for, was seen to be computed the same.
    """

    names: tuple[str, ...]
    inputs: tuple[tuple[Size, ...], ...]
    conditions: tuple[Any, ...] = ()
    single: bool = False

    @property
    def batch(self) -> Size | None:
        """The first size of the first input."""
        return next((shape[0] for shape in self.inputs if shape), None)

    def with_free_batch(self, batches: Sequence[Sequence[Tensor]]) -> Sizes:
        """The same, where the axes that differ between two batches have any size.

        Args:
            batches: the tensors of two batches of other numbers of samples.
        """
        symbol = sympy.Symbol("batch", integer=True, positive=True)
        free = tuple(
            tuple(symbol if a != b else size for size, a, b in zip(shape, one.shape, two.shape, strict=True))
            for shape, one, two in zip(self.inputs, *batches, strict=True)
        )
        return replace(self, inputs=free)

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Refuse inputs for which the graph is not what the network would compute.

        Args:
            tensors: the inputs.

        Raises:
            TraceError: if a size is another than the captured one, and not free.
        """
        known: dict[Any, int] = {}
        for expected, tensor in zip(self.inputs, tensors, strict=True):
            if len(expected) == tensor.ndim:
                known |= {size: found for size, found in zip(expected, tensor.shape, strict=True) if _is_symbol(size)}
        for name, expected, tensor in zip(self.names, self.inputs, tensors, strict=True):
            if len(expected) != tensor.ndim or any(
                _value(size, known) != found for size, found in zip(expected, tensor.shape, strict=True)
            ):
                raise TraceError(
                    f"The network was captured for inputs `{name}` of shape {_text(expected)}, and cannot be followed "
                    f"for shape {tuple(tensor.shape)}: the forward uses the fixed sizes. Give an `example_input` of "
                    "the sizes that the data has."
                )
        if self.single and known.get(self.batch) == 1:
            known = {**known, self.batch: 2}  # a size of one in another axis is still refused
        for condition in self.conditions:
            if condition.subs(known) == sympy.false:
                raise TraceError(
                    f"The network was captured under the condition {condition}, which inputs of shapes "
                    f"{', '.join(str(tuple(tensor.shape)) for tensor in tensors)} do not meet "
                    f"(captured for {', '.join(map(_text, self.inputs))}). The forward takes another branch for them. "
                    "Give an `example_input` of the sizes that the data has."
                )


def sizes_of(placeholders: Sequence[fx.Node], names: Sequence[str]) -> Sizes:
    """The sizes of captured inputs.

    Args:
        placeholders: the inputs in the graph that torch.export returned.
        names: what they are called.
    """
    inputs = tuple(tuple(map(_size, node.meta["val"].shape)) for node in placeholders)
    symbols: set[Any] = {symbol for shape in inputs for size in shape if _is_symbol(size) for symbol in [size]}
    conditions: list[Any] = []
    for shape_env in _environments(placeholders)[:1]:
        for guard in shape_env.guards:
            if guard.expr.free_symbols and guard.expr.free_symbols <= symbols:
                conditions.append(guard.expr)
        for symbol in sorted(symbols, key=str):
            bounds = shape_env.bound_sympy(symbol)
            if isinstance(bounds.lower, sympy.Integer) and bounds.lower > 1:
                conditions.append(sympy.Ge(symbol, bounds.lower))
            if isinstance(bounds.upper, sympy.Integer):
                conditions.append(sympy.Le(symbol, bounds.upper))
    return Sizes(tuple(names), inputs, tuple(dict.fromkeys(conditions)))


def hint(size: Any) -> int | None:
    """A size as a number: of a symbolic one, that of the example; ``None`` where it depends on the data."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    known: Any = size.node.hint
    return None if known is None else int(known)


def _environments(placeholders: Sequence[fx.Node]) -> list[Any]:
    modes = (getattr(node.meta["val"], "fake_mode", None) for node in placeholders)
    return [mode.shape_env for mode in modes if mode is not None and mode.shape_env is not None]


def _size(size: Any) -> Size:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression) if expression.is_number else expression


def _is_symbol(size: Any) -> bool:
    return isinstance(size, sympy.Symbol)


def _value(size: Size, known: dict[Any, int]) -> Any:
    return size if isinstance(size, int) else size.subs(known)


def _text(shape: Sequence[Size]) -> str:
    return f"({', '.join(map(str, shape))})"
