"""Nested values as the tensors in them and a structure that puts other tensors in their places."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        kind: the type of the value; ``Tensor`` for a tensor.
        context: what tells two values of one type apart, such as the keys of a dict; of a constant, the constant.
        parts: the structures of its parts.
        template: a copy of the value without its parts, for types whose other attributes are kept.
    """

    kind: type = field(compare=False)
    context: Any = field(default=None, compare=False)
    parts: tuple[Structure, ...] = ()
    template: Any = field(default=None, compare=False, repr=False)
    identity: Any = field(init=False, repr=False)  # type and context; a forward may make a named tuple anew each time

    def __post_init__(self) -> None:
        fields = getattr(self.kind, "_fields", ()) if pytree.is_namedtuple_class(self.kind) else None
        identity = (self.kind, self.context) if fields is None else (self.kind.__qualname__, fields)
        object.__setattr__(self, "identity", identity)

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
        if issubclass(self.kind, PLAIN):
            return self.context
        values, start = [], 0
        for part in self.parts:
            values.append(part.unflatten(tensors[start : start + part.count]))
            start += part.count
        return self._build(values)

    def _build(self, parts: list[Any]) -> Any:
        if issubclass(self.kind, Distribution):
            return self.kind(**dict(zip(self.context, parts, strict=True)))
        if self.template is None:
            return pytree.SUPPORTED_NODES[_registered_type(self.kind)].unflatten_fn(parts, self.context)
        return _filled(self.template, self.context, parts)


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
    names, children, context, template = _open(value, path)
    tensors: list[Tensor] = []
    parts = []
    for name, child in zip(names, children, strict=True):
        inside, part = flatten(child, f"{path}{name}")
        tensors += inside
        parts.append(part)
    return tensors, Structure(type(value), context, tuple(parts), template)


def _open(value: Any, path: str) -> tuple[list[str], list[Any], Any, Any]:
    """Names and values of the parts, what tells the value from others of its type, and its template."""
    kind = type(value)
    registered = pytree.SUPPORTED_NODES.get(_registered_type(kind))
    if isinstance(value, Distribution):
        names = [name for name in kind.arg_constraints if name in vars(value)]
        return [f".{name}" for name in names], [getattr(value, name) for name in names], names, None
    if registered is not None:
        children, context = registered.flatten_fn(value)
        names = [f"[{number}]" for number in range(len(children))]
        if isinstance(value, Mapping):
            names = [f"[{key!r}]" for key in value]
        return names, list(children), context, None
    if dataclasses.is_dataclass(value):
        names = [each.name for each in dataclasses.fields(value)]
        children = [getattr(value, name) for name in names]
        return [f".{name}" for name in names], children, names, _filled(value, names, [None] * len(names))
    if isinstance(value, Mapping):
        keys = list(value)
        return [f"[{key!r}]" for key in keys], list(value.values()), keys, _filled(value, keys, [None] * len(keys))
    raise UnknownContainerError(kind, path)


def _registered_type(kind: type) -> Any:
    """The type under which torch knows how to open a value."""
    return pytree.namedtuple if pytree.is_namedtuple_class(kind) else kind


def _filled(value: Any, keys: Sequence[Any], parts: Sequence[Any]) -> Any:
    """A copy of a dataclass or a mapping with other parts."""
    copied = copy.copy(value)
    for key, part in zip(keys, parts, strict=True):
        if dataclasses.is_dataclass(copied):
            object.__setattr__(copied, key, part)
        else:
            copied[key] = part
    return copied
