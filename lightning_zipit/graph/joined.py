"""A trunk and a head as one network again, of the architecture that they were cut from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn

from lightning_zipit.errors import ConfigurationError

UNMERGE = "unmerge"
"""Name of the submodule of a head that holds its explicit unmerges."""


class Joined(nn.Module):
    """A merged trunk and the head of one task as a network that can be merged again; it shares their tensors.

    Explicit unmerges are no part of the architecture: the forward leaves them out, and a merge composes them with its
    own.

    Args:
        trunk: the trunk.
        head: the head of one task.
        barriers: nodes that were kept out of the trunk, and why.

    Raises:
        ConfigurationError: if a module is called both in the trunk and in the head.

    Attributes:
        graph: the graph of both, as :func:`~lightning_zipit.trace` takes it.
        unmerge: per value that passes from trunk to head, what unmerges it, where that is not done by weights.
    """

    def __init__(self, trunk: fx.GraphModule, head: fx.GraphModule, barriers: Mapping[str, str]) -> None:
        super().__init__()
        self.barriers = dict(barriers)
        self.graph = fx.Graph()
        built: dict[fx.Node, fx.Node] = {}
        for node in trunk.graph.nodes:
            if node.op != "output":
                built[node] = self.graph.node_copy(node, built.__getitem__)
        crossing = iter(next(iter(reversed(trunk.graph.nodes))).args[0])
        for node in head.graph.nodes:
            if node.op == "placeholder":
                built[node] = built[next(crossing)]
            elif node.op == "call_module" and str(node.target).startswith(f"{UNMERGE}."):
                built[node] = built[node.all_input_nodes[0]]
            else:
                built[node] = self.graph.node_copy(node, built.__getitem__)
        self._take(trunk, trunk.graph)
        self._take(head, head.graph)
        self.add_module(UNMERGE, head._modules.get(UNMERGE) or nn.ModuleDict())

    def _take(self, part: nn.Module, graph: fx.Graph) -> None:
        """Hold what a graph uses, under the names that it has there."""
        names = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
        for name in sorted(name for name in names if not name.startswith(f"{UNMERGE}.")):
            *path, attribute = name.split(".")
            owner: nn.Module = self
            for step in path:
                if step not in owner._modules:
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            if hasattr(owner, attribute):
                raise ConfigurationError(
                    f"Module `{name}` is called both in the trunk and in a head of a merged module, so that the two "
                    "cannot be merged again as one network."
                )
            found = attrgetter(name)(part)
            if isinstance(found, Tensor) and not isinstance(found, nn.Parameter):
                owner.register_buffer(attribute, found)
            else:
                setattr(owner, attribute, found)

    def forward(self, x: Tensor) -> Any:
        return fx.Interpreter(self, graph=self.graph).run(x)

    def record(self) -> fx.Graph:
        """A copy of the graph, for others to work on."""
        return copy.deepcopy(self.graph)
