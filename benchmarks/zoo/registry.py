"""The networks of the zoo, by package and name: how each is made, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Inputs: TypeAlias = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
"""From a number of samples to positional and keyword arguments of a forward."""


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Attributes:
        package: the package that it comes from.
        name: what it is called in the tables.
        make: makes the network with random weights. It imports its package.
        inputs: makes an input of a number of samples.
    """

    package: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs


ENTRIES: list[Entry] = []


def network(package: str, name: str, inputs: Inputs) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Enter a function that makes a network."""

    def enter(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        ENTRIES.append(Entry(package, name, make, inputs))
        return make

    return enter


def images(channels: int = 3, size: int = 64) -> Inputs:
    """Images ``(B, channels, size, size)``."""
    return lambda count: ((torch.randn(count, channels, size, size),), {})


def volumes(channels: int = 1, size: int = 32) -> Inputs:
    """Volumes ``(B, channels, size, size, size)``."""
    return lambda count: ((torch.randn(count, channels, size, size, size),), {})


def vectors(*sizes: int) -> Inputs:
    """Features ``(B, *sizes)``."""
    return lambda count: ((torch.randn(count, *sizes),), {})


def ids(vocabulary: int = 99, length: int = 16) -> Inputs:
    """Tokens ``(B, length)`` as the first argument."""
    return lambda count: ((torch.randint(5, vocabulary, (count, length)),), {})


def text(vocabulary: int = 99, length: int = 16, **others: Callable[[int], Tensor]) -> Inputs:
    """Tokens and their mask as keyword arguments ``input_ids`` and ``attention_mask``, with others beside them."""

    def make(count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = torch.randint(5, vocabulary, (count, length))
        given = {name: of(count) for name, of in others.items()}
        return (), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **given}

    return make


def pixels(size: int = 32, channels: int = 3) -> Inputs:
    """Images as the keyword argument ``pixel_values``."""
    return lambda count: ((), {"pixel_values": torch.randn(count, channels, size, size)})
