"""Tensors that do not depend on data, such as indices computed from buffers and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_zipit.graph.values import leaves

FACTORIES: frozenset[Callable[..., Any]] = frozenset({torch.arange, torch.tensor})
"""Deterministic functions that create a tensor from numbers."""


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
        inputs = {source: self._known.get(source, values.get(source)) for source in node.all_input_nodes}
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        if not all(isinstance(part, (Tensor, int)) for value in inputs.values() for part in leaves(value)):
            return None
        if not tensors and node.target not in FACTORIES:
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), inputs.__getitem__)
        run = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
        try:
            return run(*args, **{name: value for name, value in kwargs.items() if name != "device"})
        except Exception:  # a node that cannot be evaluated is not known
            return None
