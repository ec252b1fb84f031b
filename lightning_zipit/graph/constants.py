"""Tensors that do not depend on data, such as indices computed from buffers and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from lightning_zipit.graph.registry import Trait, traits_of
from lightning_zipit.graph.values import leaves

FACTORIES: frozenset[Callable[..., Any]] = frozenset({torch.arange, torch.tensor})
"""Deterministic functions of torch that create a tensor from numbers, beside ATen operators."""
CPU = torch.device("cpu")


class Constants:
    """The data-independent tensors of a graph. Each node is evaluated once, in the order of execution.

    Args:
        module: the network.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._known: dict[fx.Node, Tensor] = {}

    def __getitem__(self, node: fx.Node) -> Tensor | None:
        """Return the tensor of a node; ``None`` if it depends on data."""
        return self._known.get(node)

    def alike(self, node: fx.Node) -> tuple[int, ...]:
        """Return the axes along which all entries of a known tensor are the same."""
        known = self._known[node]
        return tuple(axis for axis in range(known.ndim) if known.numel() and _same_along(known, axis))

    def take(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        """Evaluate a node if it depends only on known nodes.

        Args:
            node: the node.
            values: the abstract values of earlier nodes, including sizes.
        """
        value = self._buffer(node) if node.op == "get_attr" else self._computed(node, values)
        if isinstance(value, Tensor):
            self._known[node] = value

    def _buffer(self, node: fx.Node) -> Tensor | None:
        tensor = attrgetter(str(node.target))(self.module)
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_meta:
            return None
        return tensor.detach().cpu().clone()  # an operator may write into it

    def _computed(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op not in ("call_function", "call_method"):
            return None
        inputs = {source: self._input(source, node, values) for source in node.all_input_nodes}
        parts = [part for value in inputs.values() for part in leaves(value)]
        if not all(isinstance(part, (Tensor, int, float, torch.device)) for part in parts):
            return None
        if not any(isinstance(part, Tensor) for part in parts) and not _creates(node.target):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), inputs.__getitem__)
        run = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
        try:
            return run(*args, **{name: value for name, value in kwargs.items() if name != "device"})
        except Exception:  # a node that cannot be evaluated is not known
            return None

    def _input(self, source: fx.Node, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """The value of an input: a known tensor, a size, any device, or a tensor of which only the shape matters."""
        if source.target is getattr and source.args[1] == "device":
            return CPU
        if source in self._known:
            return self._known[source]
        value = values.get(source)
        shape = getattr(value, "shape", None)
        if shape is None or None in shape:  # None is a size that depends on data
            return value
        if Trait.SHAPE in traits_of(node, self.module) and "dtype" in source.meta:
            return torch.empty(shape, dtype=source.meta["dtype"])
        return value


def _creates(target: Any) -> bool:
    """Whether a function creates the same tensor each time from numbers alone."""
    if not isinstance(target, OpOverload):
        return target in FACTORIES
    return torch.Tag.nondeterministic_seeded not in target.tags and "empty" not in target._schema.name


def _same_along(tensor: Tensor, axis: int) -> bool:
    first = tensor.narrow(axis, 0, 1)
    return bool(((tensor == first) | (tensor.isnan() & first.isnan())).all())
