"""Tensors that are known before any data is, such as indices that come from buffers and sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_zipit.graph.values import leaves

FACTORIES: frozenset[Callable[..., Any]] = frozenset({torch.arange, torch.tensor})
"""What makes a tensor out of numbers alone, the same one each time."""


class Constants:
    """The known tensors of a graph; each node is looked at once, in the order of execution.

    Args:
        module: the network.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._known: dict[fx.Node, Tensor] = {}

    def __getitem__(self, node: fx.Node) -> Tensor | None:
        """What a node returns, where that is known."""
        return self._known.get(node)

    def take(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        """Find out whether a node is known from the nodes before it.

        Args:
            node: the node.
            values: what is known of the nodes before, sizes among it.
        """
        value = self._buffer(node) if node.op == "get_attr" else self._computed(node, values)
        if isinstance(value, Tensor):
            self._known[node] = value

    def _buffer(self, node: fx.Node) -> Tensor | None:
        tensor = attrgetter(str(node.target))(self.module)
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_meta:
            return None
        return tensor.detach().cpu().clone()  # it may be written in place

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
        except Exception:  # whatever it raises: it is then not known
            return None
