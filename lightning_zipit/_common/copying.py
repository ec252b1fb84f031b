"""Deep copies of modules that hold tensors with gradient history."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

Copied = TypeVar("Copied", bound=nn.Module)


def copy_module(module: Copied, memo: dict[int, Any] | None = None) -> Copied:
    """Copy a module deeply, including tensors with gradient history.

    A forward can store tensors with gradient history in a module, such as a weight computed by weight norm, or features
    kept by a hook. ``copy.deepcopy`` fails for these tensors. Here, the copy holds them detached.

    Args:
        module: the module. It is not changed.
        memo: replacements for objects that are not to be copied, by the ``id`` of the object.
    """
    memo = {} if memo is None else memo
    for tensor in _tensors_with_history(module):
        memo.setdefault(id(tensor), tensor.detach().clone())
    return copy.deepcopy(module, memo)


def _tensors_with_history(module: nn.Module) -> Iterator[Tensor]:
    """Find tensors with gradient history in attributes, in containers, and in modules whose methods are hooks."""
    waiting: list[Any] = [module]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, nn.Module):
            waiting += [each for name, each in vars(value).items() if name != "_trainer"]
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif isinstance(value, MethodType):
            waiting.append(value.__self__)
