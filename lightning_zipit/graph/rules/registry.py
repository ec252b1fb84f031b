"""How the rules of this folder enter the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_zipit.graph.interpret import OWN_FORWARD, PRODUCERS, Rule, register_rule


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
