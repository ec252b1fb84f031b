"""The arguments of a forward: their names, and one way to write calls that mean the same."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from lightning_zipit._common.calls import Call
from lightning_zipit._common.structure import PLAIN, Structure

ARGUMENTS = "_arguments_of_network"
"""Attribute of a module whose forward takes any arguments: those of the network that it stands for."""


@dataclass(frozen=True)
class Arguments:
    """The arguments that a forward takes. Without names, calls stay as they are.

    Attributes:
        names: the arguments that can be given by position.
        by_position_alone: how many of them cannot be given by keyword.
        others: the arguments that can be given by keyword alone.
        defaults: the values of arguments that are left out, if they hold no tensors.
    """

    names: tuple[str, ...] = ()
    by_position_alone: int = 0
    others: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, network: nn.Module) -> Arguments:
        """Return the arguments of a network."""
        if ARGUMENTS in vars(network):
            known: Arguments = vars(network)[ARGUMENTS]
            return known
        try:
            parameters = inspect.signature(network.forward).parameters.values()
        except (TypeError, ValueError):  # such as of compiled code
            return cls()
        alone = [each.name for each in parameters if each.kind is each.POSITIONAL_ONLY]
        names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        others = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
        defaults = {each.name: each.default for each in parameters if isinstance(each.default, PLAIN)}
        return cls((*alone, *names), len(alone), tuple(others), defaults)

    def bind(self, call: Call) -> Call:
        """Write a call in one way: in the order of the forward, by position if possible, without default values.

        Args:
            call: any call of the forward.
        """
        positional, keywords = call.structure.parts
        count = len(positional.parts)
        by_position: list[Any] = [*self.names[:count], *range(count - len(self.names))]  # those of `*args` by number
        keys = [*by_position, *keywords.context]
        if not self.names + self.others or len(set(keys)) < len(keys):
            return call
        parts = dict(zip(keys, (*positional.parts, *keywords.parts), strict=True))
        first, rest = self._places(parts, by_position)
        tensors = dict(zip(keys, _cut(call), strict=True))
        order = [number for key in (*first, *rest) for number in tensors[key]]
        known = call.known if order == sorted(order) else call.batched
        return Call(
            tuple(call.tensors[number] for number in order),
            replace(
                call.structure,
                parts=(
                    replace(positional, parts=tuple(parts[key] for key in first)),
                    replace(keywords, context=rest, parts=tuple(parts[key] for key in rest)),
                ),
            ),
            None if known is None else tuple(known[number] for number in order),
        )

    def _places(self, parts: Mapping[Any, Structure], by_position: list[Any]) -> tuple[list[Any], list[Any]]:
        """The arguments to give by position, and those to give by keyword."""
        more = any(isinstance(key, int) for key in by_position)  # `*args` need all arguments before them
        first = by_position if more else []
        known = dict.fromkeys((*self.names, *self.others))
        rest = [key for key in known if key in parts and key not in first and not self._is_default(key, parts[key])]
        if not more:
            first = [key for key, name in zip(rest, self.names, strict=False) if key == name]
        return first, [
            *rest[0 if more else len(first) :],
            *(key for key in parts if key not in known and key not in first),
        ]

    def _is_default(self, name: str, part: Structure) -> bool:
        """Whether an argument, which can be left out, has its default value."""
        if name not in self.defaults or name in self.names[: self.by_position_alone]:
            return False
        default = self.defaults[name]
        return part.kind is type(default) and part.context == default


def _cut(call: Call) -> Iterator[range]:
    """The numbers of the tensors of each argument."""
    counts = [part.count for parts in call.structure.parts for part in parts.parts]
    ends = list(accumulate(counts))
    return (range(end - count, end) for end, count in zip(ends, counts, strict=True))


def names_of(inputs: Structure, network: nn.Module) -> list[str]:
    """What the tensors of an input are called: the names of the forward's arguments, and where they are inside.

    Args:
        inputs: the structure of positional and keyword arguments.
        network: the network.
    """
    positional, keywords = inputs.parts
    names = list(Arguments.of(network).names)
    names += [f"argument_{number}" for number in range(len(names), len(positional.parts))]
    parts = (*zip(names, positional.parts, strict=False), *zip(keywords.context, keywords.parts, strict=True))
    return [name for argument, part in parts for name in _names_inside(part, argument)]


def _names_inside(structure: Structure, path: str) -> list[str]:
    if structure.kind is Tensor:
        return [path]
    keys = structure.context if isinstance(structure.context, list) else range(len(structure.parts))
    pairs = zip(keys, structure.parts, strict=True)
    return [name for key, part in pairs for name in _names_inside(part, f"{path}[{key!r}]")]
