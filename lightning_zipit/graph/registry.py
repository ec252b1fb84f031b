"""Registry of operators: one record per operator, with its rule and its traits."""

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
    """Properties of an operator. All other modules ask for these instead of listing operators."""

    POINTWISE = auto()
    """Applies one function to each entry, such as an activation function."""
    IDENTITY = auto()
    """Is the identity in eval mode, such as dropout."""
    VIEW = auto()
    """Returns a tensor that may share memory with its input."""
    IN_PLACE = auto()
    """Always writes into its first input, independent of its arguments."""
    REARRANGE = auto()
    """Moves, copies or drops entries, without changing their values."""
    POOLING = auto()
    """Combines positions within each feature."""
    LINEAR = auto()
    """A contraction with a weight: linear in the features that it reads."""
    SUM = auto()
    """Adds two tensors elementwise."""
    DIFFERENCE = auto()
    """Subtracts two tensors elementwise."""
    PRODUCT = auto()
    """Multiplies two tensors elementwise."""
    PER_FEATURE = auto()
    """Has a parameter entry for each feature, and preserves the features, such as the scale of a norm."""
    SYMMETRIC = auto()
    """Mixes features, and commutes with permutations of them."""
    NORM = auto()
    """A normalization with a scale and a shift for each feature."""
    LOOKUP = auto()
    """Looks up rows of its weight by integer indices."""
    PRODUCER = auto()
    """Returns new features, independent of the features of its input."""
    SHAPE = auto()
    """Returns sizes or other values that do not depend on data."""


NOTHING = Trait(0)


@dataclass(frozen=True)
class Operator:
    """The record of an operator.

    Attributes:
        rule: function that describes its effect on features; see :func:`register_rule`.
        traits: its properties.
        ignored: arguments, or attributes of the module, that have no effect in eval mode, such as ``momentum``.
    """

    rule: Rule
    traits: Trait = NOTHING
    ignored: frozenset[str] = frozenset()


OPERATORS: dict[Any, Operator] = {}
"""Operator (a module class, a function, their dotted name, or the name of a tensor method) → its record."""


def register_rule(op_or_module: Any, rule: Rule, traits: Trait = NOTHING, ignored: Iterable[str] = ()) -> None:
    """Register the rule of an operator, which describes its effect on features.

    Args:
        op_or_module: an operator of a captured graph, such as ``torch.ops.my_project.gain.default``; or a module
            class, whose rule replaces those of the operators inside if its ``forward`` takes one tensor and returns
            one. A dotted name of a class, such as ``"package.module.Block"``, needs no import. A subclass inherits the
            rule, unless it overrides ``forward`` or a method that ``forward`` calls.
        rule: ``rule(ctx, *args, **kwargs)`` for operators, ``rule(ctx, module, x)`` for modules. A tensor argument is
            passed as :class:`Features`, or as :class:`Plain` if it holds no features. A parameter is passed as
            :class:`Parameter`. All other arguments are passed unchanged. The rule returns the value of the output. It
            records the axes that belong together with ``ctx.tie``, ``ctx.units``, ``ctx.write`` and ``ctx.read``.
        traits: the properties of the operator.
        ignored: arguments, or attributes of the module, that have no effect in eval mode.

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
    """Return a decorator that registers a rule for functions, tensor methods or module classes."""

    def register(function: Rule) -> Rule:
        for known in operators:
            register_rule(known, function, traits, ignored)
        return function

    return register


module_rule = rule


def spellings(names: str) -> list[Any]:
    """Return all operators with the given names: functions of torch and of ``operator``, and tensor methods."""
    found: dict[Any, None] = {}
    for name in names.split():
        functions = (getattr(module, name, None) for module in (torch, torch.nn.functional, torch.special, operator))
        found |= dict.fromkeys(filter(callable, functions))
        found |= dict.fromkeys([name] if callable(getattr(torch.Tensor, name, None)) else [])
    return list(found)


def in_place(names: str) -> list[Any]:
    """Return the in-place variants of :func:`spellings`."""
    augmented = [getattr(operator, f"i{name.rstrip('_')}", None) for name in names.split()]
    return [*spellings(" ".join(f"{name}_" for name in names.split() if name[-1] != "_")), *filter(callable, augmented)]


ALIASES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}
"""NumPy's names of arguments, which torch accepts, and torch's own names."""
FORWARDING = frozenset({"forward", "__call__", "_call_impl", "_wrapped_call_impl"})


def spelled(rule: Rule, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Rename keyword arguments to the names that a rule uses."""
    known = _parameters(rule)
    return {name if name in known else ALIASES.get(name, name): value for name, value in kwargs.items()}


@cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's parameters; empty if it has no signature."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


@cache
def _called_in_forward(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names of the methods that ``forward`` may call, directly or indirectly."""
    found, open_names = set(FORWARDING), ["forward"]
    while open_names:
        code = getattr(inspect.unwrap(getattr(cls, open_names.pop(), None) or len), "__code__", None)
        names = {name for name in getattr(code, "co_names", ()) if inspect.isfunction(getattr(cls, name, None))}
        open_names += names - found
        found |= names
    return frozenset(found)


def operator_of_module(module: nn.Module) -> Operator | None:
    """Return the record of a module's class, or of a base class whose forward it does not override."""
    for cls in type(module).__mro__:
        known = OPERATORS.get(cls) or OPERATORS.get(f"{cls.__module__}.{cls.__qualname__}")
        if known is not None:
            return None if has_own_forward(module, cls) else known
    return None


def has_own_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a module overrides the ``forward`` of a base class, or a method that this calls."""
    called = _called_in_forward(base)  # type: ignore[arg-type]
    own = any(getattr(type(module), name, None) is not getattr(base, name, None) for name in called)
    return own or not called.isdisjoint(module.__dict__)


def operator_of(node: fx.Node, module: nn.Module) -> Operator | None:
    """Return the record of a node's operator; ``None`` if it is not registered.

    Args:
        node: a node of the network's graph.
        module: the network.
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
    """Return the traits of a node's operator; none if it is not registered."""
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
    """Return a positional or keyword argument of a function call; ``None`` if it is missing."""
    known = _parameters(node.target) if callable(node.target) else ()
    position = known.index(name) if name in known else len(node.args)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)
