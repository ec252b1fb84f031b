"""Deep copies of users' modules, whatever a forward has left in them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

Copied = TypeVar("Copied", bound=nn.Module)


def copy_module(module: Copied, memo: dict[int, Any] | None = None) -> Copied:
    """A deep copy of a module.

    A forward can leave tensors in a module that gradients lead through, such as a weight that weight norm computes or
    features that a hook keeps. Python cannot copy these; the copy has them without their history.

    Args:
        module: the module; it is left as it is.
        memo: what is not to be copied, by ``id``, with what to put in its place.
    """
    memo = {} if memo is None else memo
    for tensor in _tensors_with_history(module):
        memo.setdefault(id(tensor), tensor.detach().clone())
    return copy.deepcopy(module, memo)


def _tensors_with_history(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that gradients lead through, in attributes, containers, and modules whose methods are hooks."""
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
