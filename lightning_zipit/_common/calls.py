"""The arguments of a call of a network: any number of tensors, nested in any way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_zipit._common.structure import Structure, flatten


def as_call(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: of a tuple the former, of a dict the latter, of anything else one argument."""
    if type(value) is tuple:
        return value, {}
    if isinstance(value, Mapping):
        return (), dict(value)
    return (value,), {}


@dataclass(frozen=True)
class Call:
    """The arguments of a call of a network, for a batch of samples.

    Attributes:
        tensors: the tensors in the arguments.
        structure: the structure of positional and keyword arguments.
        known: per tensor, whether its first axis is the batch; ``None`` to tell by the sizes. See :attr:`batched`.
    """

    tensors: tuple[Tensor, ...]
    structure: Structure
    known: tuple[bool, ...] | None = None

    @classmethod
    def of(cls, value: Any) -> Call:
        """Make a call of a value: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

        Raises:
            UnknownContainerError: if an argument is of a type that may hold tensors, and does not say where.
        """
        return value if isinstance(value, Call) else cls.of_arguments(*as_call(value))

    @classmethod
    def of_arguments(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Make a call of positional and keyword arguments; see :meth:`of`."""
        tensors, structure = flatten((args, dict(kwargs)), "input")
        return cls(tuple(tensors), structure)

    @property
    def batched(self) -> tuple[bool, ...]:
        """Per tensor, whether its first axis is the batch.

        The batch is the first axis of the first tensor that has axes, and of all tensors with as many entries there.
        """
        if self.known is not None:
            return self.known
        samples = next((len(tensor) for tensor in self.tensors if tensor.ndim), 0)
        return tuple(each.ndim > 0 and len(each) == samples for each in self.tensors)

    @property
    def samples(self) -> int:
        """The number of samples."""
        return next((len(tensor) for tensor, chosen in zip(self.tensors, self.batched, strict=True) if chosen), 0)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return self.tensors[0].device if self.tensors else torch.device("cpu")

    @property
    def copies(self) -> tuple[Tensor, ...]:
        """Copies of the tensors, which a network may change in place."""
        return tuple(tensor.clone() for tensor in self.tensors)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        args, kwargs = self.structure.unflatten(self.tensors)
        return tuple(args), kwargs

    @property
    def value(self) -> Any:
        """The value of which :meth:`of` makes this call. A call with both kinds of arguments is its own value."""
        args, kwargs = self.arguments
        if args and kwargs:
            return self
        return kwargs if kwargs else args[0] if len(args) == 1 else args

    def fits(self, structure: Structure) -> bool:
        """Whether a graph that was captured for arguments of a structure can run on these arguments.

        A single tensor may be given by position or by keyword, and beside arguments that are ``None``.
        """
        if self.structure == structure:
            return True
        return self.structure.count == structure.count == 1 and _constants(self.structure) == _constants(structure)

    def run(self, network: Callable[..., Any]) -> Any:
        """Call a network with copies of the tensors, because a forward may change its input in place."""
        args, kwargs = self.structure.unflatten(self.copies)
        return network(*args, **kwargs)

    def each(self, change: Callable[[Tensor], Tensor]) -> Call:
        """Return the call with a function applied to every tensor."""
        return replace(self, tensors=tuple(map(change, self.tensors)), known=self.batched)

    def _each_batched(self, change: Callable[[Tensor], Tensor]) -> Call:
        pairs = zip(self.tensors, self.batched, strict=True)
        changed = tuple(change(tensor) if chosen else tensor for tensor, chosen in pairs)
        return replace(self, tensors=changed, known=self.batched)

    def first(self, samples: int) -> Call:
        """Return the call with the first samples."""
        return self._each_batched(lambda tensor: tensor[:samples])

    def repeated(self, samples: int) -> Call:
        """Return the call with another number of samples, which are the samples that there are, in turn."""
        return self._each_batched(lambda tensor: tensor[torch.arange(samples, device=tensor.device) % len(tensor)])

    def to(self, device: torch.device, dtype: torch.dtype) -> Call:
        """Return the call on a device, with floating-point tensors of a dtype."""
        return self.each(lambda one: one.to(device, dtype if one.is_floating_point() else None))

    def with_noise(self) -> Call:
        """Return the call with noise in place of floating-point tensors, the same each time."""
        return self.each(_noise)

    def blank(self) -> Call:
        """Return one sample on the CPU: zeros, and ones for masks; for other indices the smallest that occurs."""
        return self.first(1).each(_blank)


def _constants(structure: Structure) -> list[Any]:
    if structure.parts:
        return [value for part in structure.parts for value in _constants(part)]
    return [structure.context] if structure.kind not in (Tensor, type(None), tuple, list, dict) else []


def _noise(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach()
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)


def _blank(tensor: Tensor) -> Tensor:
    found = torch.zeros_like(tensor, device="cpu", memory_format=torch.contiguous_format)
    if tensor.is_floating_point() or tensor.is_complex() or not tensor.numel():
        return found
    smallest, largest = tensor.min().cpu(), tensor.max().cpu()
    return found | largest if tensor.dtype is torch.bool else found + (largest if largest <= 1 else smallest)
