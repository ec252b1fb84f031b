"""The table of operators: one record each, with the rule that follows features through it and what else is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any

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
        for operator in operators:
            register_rule(operator, function, traits, ignored)
        return function

    return register


module_rule = rule


def operator_of_module(module: nn.Module) -> Operator | None:
    """The record of a module's class, or of a base whose ``forward`` it has."""
    if "forward" in module.__dict__:
        return None
    for cls in type(module).__mro__:
        known = OPERATORS.get(cls) or OPERATORS.get(f"{cls.__module__}.{cls.__qualname__}")
        if known is not None:
            return known if getattr(cls, "forward", None) is type(module).forward else None
    return None


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
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    return OPERATORS.get(target) or OPERATORS.get(name)


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
    return bool(node.kwargs.get("inplace")) or Trait.IN_PLACE in traits_of(node, module)
