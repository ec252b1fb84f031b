"""Descriptions of optimizers and schedulers in files: a class, and keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning_zipit._lightning.files.names import import_path
from lightning_zipit._lightning.files.trust import Trust

PLAIN = (type(None), bool, int, float, str)


def describe_function(function: Callable[..., Any]) -> dict[str, Any] | None:
    """Describe a class, or a ``functools.partial`` of one; return ``None`` for any other function.

    Example:
        >>> import torch
        >>> describe_function(partial(torch.optim.SGD, lr=0.1))
        {'class_path': 'torch.optim.sgd:SGD', 'init_args': {'lr': 0.1}}
    """
    found, arguments = function, dict[str, Any]()
    if isinstance(function, partial):
        found, arguments = function.func, dict(function.keywords)
    path = import_path(found) if isinstance(found, type) else None
    plain = all(map(_is_plain, arguments.values())) and not getattr(function, "args", ())
    return {"class_path": path, "init_args": arguments} if path is not None and plain else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def make_function(description: Mapping[str, Any] | None, trust: Trust) -> Callable[..., Any] | None:
    """Make a function of its description; return ``None`` if there is none, or its class is not allowed."""
    if description is None or not trust.allows(description["class_path"]):
        return None
    return partial(trust.find(description["class_path"]), **description["init_args"])
