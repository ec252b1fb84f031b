"""Which rule an operator has, and how rules enter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}
"""Operator (a module class, a function, their dotted name, or the name of a tensor method) → what it does."""
PRODUCERS: set[Rule] = set()
"""Rules whose output features are new whatever comes in."""
OWN_FORWARD: set[Rule] = set()
"""Rules of module classes that do not hold for a subclass with a forward of its own."""


def register_rule(op_or_module: Any, rule: Rule) -> None:
    """Teach tracing an operator.

    Args:
        op_or_module: a module class, a function, the dotted name of either (``"package.module.Block"``, so that
            nothing need be imported), or the name of a tensor method. A module class with a rule is not traced into.
        rule: ``rule(ctx, *args, **kwargs)`` for functions and methods, ``rule(ctx, module, *args, **kwargs)`` for
            modules. Tensors arrive as :class:`Features` (or :class:`Plain` where they hold none), parameters that a
            function is given as :class:`Parameter`, all else as it is. It returns the value of the output, and says
            with ``ctx.tie``, ``ctx.units``, ``ctx.write`` and ``ctx.read`` what belongs together.

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
    RULES[op_or_module] = rule


def rule(*operators: Any, producer: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for functions and tensor methods."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            register_rule(operator, function)
        if producer:
            PRODUCERS.add(function)
        return function

    return register


def module_rule(*modules: Any, producer: bool = False, own_forward: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for module classes; with ``own_forward`` not for subclasses that override ``forward``."""

    def register(function: Rule) -> Rule:
        if own_forward:
            OWN_FORWARD.add(function)
        return rule(*modules, producer=producer)(function)

    return register


def module_rule_of(module: nn.Module) -> Rule | None:
    """The rule of a module's class; it inherits those of its bases."""
    for cls in type(module).__mro__:
        rule = RULES.get(cls) or RULES.get(f"{cls.__module__}.{cls.__qualname__}")
        if rule and (rule not in OWN_FORWARD or getattr(cls, "forward", None) is type(module).forward):
            return rule
    return None


def find_rule(node: fx.Node, module: nn.Module) -> Rule | None:
    """The rule for a node's operator."""
    if node.op == "call_module":
        return module_rule_of(module.get_submodule(str(node.target)))
    target = node.target
    if isinstance(target, str):
        return RULES.get(target)
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    return RULES.get(target) or RULES.get(name)
