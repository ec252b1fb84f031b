"""The table of operators: one record each, with the rule that follows features through it and what else is known."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from functools import cache
from typing import Any

import torch
from torch import fx, nn

Rule = Callable[..., Any]


class Trait(Flag):
    """What is known of an operator beside its rule. Every question about operators is a question about these."""

    POINTWISE = auto()
    """Acts on each entry by itself, the same way on all, such as an activation function."""
    IDENTITY = auto()
    """Returns its input in eval mode, such as dropout."""
    VIEW = auto()
    """Its result can share memory with its input."""
    IN_PLACE = auto()
    """Writes into its first input, whatever its arguments are."""
    REARRANGE = auto()
    """Moves entries, or leaves some out, and changes none."""
    POOLING = auto()
    """Combines positions within each feature."""
    LINEAR = auto()
    """A contraction with a weight: linear in the features that it reads."""
    SUM = auto()
    """Adds two tensors entry by entry."""
    DIFFERENCE = auto()
    """Subtracts one tensor from another entry by entry."""
    PRODUCT = auto()
    """Multiplies two tensors entry by entry."""
    PER_FEATURE = auto()
    """Has a parameter for each feature that it leaves, such as a norm's scale."""
    SYMMETRIC = auto()
    """Permutation-invariant: mixes features, and treats all of them alike."""
    NORM = auto()
    """A normalisation with a scale and a shift for each feature."""
    LOOKUP = auto()
    """Takes rows of its weight by whole numbers."""
    PRODUCER = auto()
    """The features that it returns are new, whatever it is given."""
    SHAPE = auto()
    """Returns sizes or other numbers that are known before any data is."""


NOTHING = Trait(0)


@dataclass(frozen=True)
class Operator:
    """What is known of an operator.

    Attributes:
        rule: what it does to features; see :func:`register_rule`.
        traits: what else it is.
        ignored: arguments, or attributes of the module, that change nothing in eval mode, such as ``momentum``.
    """

    rule: Rule
    traits: Trait = NOTHING
    ignored: frozenset[str] = frozenset()


OPERATORS: dict[Any, Operator] = {}
"""Operator (a module class, a function, their dotted name, or the name of a tensor method) → its record."""


def register_rule(op_or_module: Any, rule: Rule, traits: Trait = NOTHING, ignored: Iterable[str] = ()) -> None:
    """Teach tracing an operator.

    Args:
        op_or_module: a module class, a function, the dotted name of either (``"package.module.Block"``, so that
            nothing need be imported), or the name of a tensor method. A module class with a rule is not traced into;
            a subclass has the rule too, unless its ``forward`` is its own.
        rule: ``rule(ctx, *args, **kwargs)`` for functions and methods, ``rule(ctx, module, *args, **kwargs)`` for
            modules. Tensors arrive as :class:`Features` (or :class:`Plain` where they hold none), parameters that a
            function is given as :class:`Parameter`, all else as it is. It returns the value of the output, and says
            with ``ctx.tie``, ``ctx.units``, ``ctx.write`` and ``ctx.read`` what belongs together.
        traits: what else the operator is.
        ignored: arguments, or attributes of the module, that change nothing in eval mode.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.factor = nn.Parameter(torch.ones(channels))
        ...     def forward(self, x):
        ...         return torch.einsum("bchw,c->bchw", x, self.factor)
        >>> def scale(ctx, module, x):
        ...     ctx.write(ctx.parameter("factor"), 0, x)  # one factor per feature: same order as the features
        ...     return x
        >>> register_rule(Scale, scale)
    """
    OPERATORS[op_or_module] = Operator(rule, traits, frozenset(ignored))


def rule(*operators: Any, traits: Trait = NOTHING, ignored: Iterable[str] = ()) -> Callable[[Rule], Rule]:
    """Register a rule for functions and tensor methods, or for module classes."""

    def register(function: Rule) -> Rule:
        for known in operators:
            register_rule(known, function, traits, ignored)
        return function

    return register


module_rule = rule


def spellings(names: str) -> list[Any]:
    """All that torch calls by some names: functions of its modules and of ``operator``, and methods of tensors."""
    found: dict[Any, None] = {}
    for name in names.split():
        functions = (getattr(module, name, None) for module in (torch, torch.nn.functional, torch.special, operator))
        found |= dict.fromkeys(filter(callable, functions))
        found |= dict.fromkeys([name] if callable(getattr(torch.Tensor, name, None)) else [])
    return list(found)


def in_place(names: str) -> list[Any]:
    """The variants of :func:`spellings` that write into their first input."""
    augmented = [getattr(operator, f"i{name.rstrip('_')}", None) for name in names.split()]
    return [*spellings(" ".join(f"{name}_" for name in names.split() if name[-1] != "_")), *filter(callable, augmented)]


ALIASES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}
"""The names that torch takes from numpy for arguments, and its own."""
FORWARDING = frozenset({"forward", "__call__", "_call_impl", "_wrapped_call_impl"})


def spelled(rule: Rule, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments under the names that a rule knows them by."""
    known = _parameters(rule)
    return {name if name in known else ALIASES.get(name, name): value for name, value in kwargs.items()}


@cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's parameters; none where it does not say."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


@cache
def _called_in_forward(cls: type[nn.Module]) -> frozenset[str]:
    """The names of the methods that a module's ``forward`` can lead to."""
    found, open_names = set(FORWARDING), ["forward"]
    while open_names:
        code = getattr(inspect.unwrap(getattr(cls, open_names.pop(), None) or len), "__code__", None)
        names = {name for name in getattr(code, "co_names", ()) if inspect.isfunction(getattr(cls, name, None))}
        open_names += names - found
        found |= names
    return frozenset(found)


def operator_of_module(module: nn.Module) -> Operator | None:
    """The record of a module's class, or of a base whose ``forward`` it has, with all that this calls."""
    for cls in type(module).__mro__:
        known = OPERATORS.get(cls) or OPERATORS.get(f"{cls.__module__}.{cls.__qualname__}")
        if known is not None:
            return None if has_own_forward(module, cls) else known
    return None


def has_own_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a module computes something else than its base: its ``forward``, or what that calls, is its own."""
    called = _called_in_forward(base)  # type: ignore[arg-type]
    own = any(getattr(type(module), name, None) is not getattr(base, name, None) for name in called)
    return own or not called.isdisjoint(module.__dict__)


def operator_of(node: fx.Node, module: nn.Module) -> Operator | None:
    """The record of a node's operator.

    Args:
        node: a node of a graph.
        module: the network that the graph is of.
    """
    if node.op == "call_module":
        return operator_of_module(module.get_submodule(str(node.target)))
    if node.op not in ("call_function", "call_method"):
        return None
    target = node.target
    if isinstance(target, str):
        return OPERATORS.get(target)
    name = str(getattr(target, "__name__", ""))
    if getattr(torch.Tensor, name, None) is target:
        return OPERATORS.get(name)
    return OPERATORS.get(target) or OPERATORS.get(
        f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    )


def traits_of(node: fx.Node, module: nn.Module) -> Trait:
    """The traits of a node's operator; none where it is not known."""
    known = operator_of(node, module)
    return known.traits if known is not None else NOTHING


def writes_in_place(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node writes into its first input."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    return bool(_argument(node, "inplace")) or Trait.IN_PLACE in traits_of(node, module)


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of a function, wherever it stands; ``None`` where it is not given."""
    known = _parameters(node.target) if callable(node.target) else ()
    position = known.index(name) if name in known else len(node.args)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)
