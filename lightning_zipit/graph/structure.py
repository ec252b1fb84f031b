"""Nested values as the tensors in them and a structure that puts other tensors in their places."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)
"""Values that hold no tensors."""


class UnknownContainerError(TypeError):
    """A value of a type that may hold tensors, and does not say where.

    Attributes:
        kind: the type.
        path: where the value is.
    """

    def __init__(self, kind: type, path: str) -> None:
        super().__init__(f"{path or 'the value'} is a {kind.__module__}.{kind.__qualname__}")
        self.kind, self.path = kind, path


@dataclass(frozen=True)
class Structure:
    """A nested value without its tensors.

    Attributes:
        build: makes the value from its parts; ``None`` for a tensor, and for a constant.
        kind: the type of the value.
        context: what tells two values of one type apart, such as the keys of a dict; of a constant, the constant.
        parts: the structures of its parts.
    """

    kind: type
    context: Any = None
    parts: tuple[Structure, ...] = ()
    build: Callable[[list[Any]], Any] | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def count(self) -> int:
        """The number of tensors."""
        return sum(part.count for part in self.parts) + (self.kind is Tensor)

    def unflatten(self, tensors: Sequence[Any]) -> Any:
        """The value with other tensors, which come in the order of :func:`flatten`."""
        if len(tensors) != self.count:
            raise ValueError(f"expected {self.count} tensors, got {len(tensors)}")
        if self.kind is Tensor:
            return tensors[0]
        if self.build is None:
            return self.context
        values, start = [], 0
        for part in self.parts:
            values.append(part.unflatten(tensors[start : start + part.count]))
            start += part.count
        return self.build(values)


def flatten(value: Any, path: str = "") -> tuple[list[Tensor], Structure]:
    """The tensors in a nested value, and its structure.

    Tuples, lists, dicts, named tuples, dataclasses, mappings, and types that are registered with
    ``torch.utils._pytree`` can be nested; distributions of torch count as their parameters.

    Args:
        value: the value.
        path: what errors call it.

    Raises:
        UnknownContainerError: if a value inside is of any other type.
    """
    if isinstance(value, Tensor):
        return [value], Structure(Tensor)
    if isinstance(value, PLAIN):
        return [], Structure(type(value), value)
    names, children, context, build = _open(value, path)
    tensors: list[Tensor] = []
    parts = []
    for name, child in zip(names, children, strict=True):
        inside, part = flatten(child, f"{path}{name}")
        tensors += inside
        parts.append(part)
    return tensors, Structure(type(value), context, tuple(parts), build)


def _open(value: Any, path: str) -> tuple[list[str], list[Any], Any, Callable[[list[Any]], Any]]:
    """Names and values of the parts, what else the value is, and how to make another of other parts."""
    kind = type(value)
    registered = pytree.SUPPORTED_NODES.get(pytree._get_node_type(value))
    if isinstance(value, Distribution):
        fields = [name for name in kind.arg_constraints if name in vars(value)]
        children = [getattr(value, name) for name in fields]
        return _dotted(fields), children, fields, lambda parts: kind(**dict(zip(fields, parts, strict=True)))
    if registered is not None:
        children, context = registered.flatten_fn(value)
        names = [f"[{number}]" for number in range(len(children))]
        if isinstance(value, Mapping):
            names = [f"[{key!r}]" for key in value]
        return names, list(children), context, lambda parts: registered.unflatten_fn(parts, context)
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        return _dotted(fields), [getattr(value, name) for name in fields], fields, _replacing(value, fields, setattr)
    if isinstance(value, Mapping):
        keys = list(value)
        return [f"[{key!r}]" for key in keys], list(value.values()), keys, _replacing(value, keys, _set_item)
    raise UnknownContainerError(kind, path)


def _dotted(fields: list[str]) -> list[str]:
    return [f".{name}" for name in fields]


def _set_item(mapping: Any, key: Any, part: Any) -> None:
    mapping[key] = part


def _replacing(value: Any, keys: list[Any], put: Callable[[Any, Any, Any], None]) -> Callable[[list[Any]], Any]:
    def build(parts: list[Any]) -> Any:
        copied = copy.copy(value)
        for key, part in zip(keys, parts, strict=True):
            (object.__setattr__ if put is setattr else put)(copied, key, part)
        return copied

    return build
