"""Splits a traced network into a trunk and a head: real modules, nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from lightning_zipit.graph import MergeGraph
from lightning_zipit.merging import SpaceMap

UNMERGE = "unmerge"
"""Name of the submodule of a head that holds its explicit unmerges."""


class Unmerge(nn.Module):
    """U_i as a layer: gives every feature of one source model the merged feature that stands for it.

    Args:
        size: entries along the axis.
        axis: the axis that holds the features.
    """

    index: Tensor

    def __init__(self, size: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("index", torch.arange(size))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with ``size`` entries along the axis."""
        return x.index_select(self.axis, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.index)}, axis={self.axis}"


def build_trunk(graph: MergeGraph) -> fx.GraphModule:
    """The part of the network that all tasks share, with copies of the traced network's weights.

    Args:
        graph: the merge graph of the network.

    Returns:
        A module from the input to a tuple of what the heads take.
    """
    trunk = fx.Graph()
    built: dict[fx.Node, fx.Node] = {}
    for node in graph.trunk_graph():
        built[node] = trunk.node_copy(node, built.__getitem__)
    by_name = {node.name: node for node in built}
    trunk.output(tuple(built[by_name[crossing.node]] for crossing in graph.crossings))
    return _module(graph.module, trunk, "Trunk")


def build_head(graph: MergeGraph) -> fx.GraphModule:
    """The rest of one task's network, with copies of its weights.

    Args:
        graph: the merge graph of that task's network.

    Returns:
        A module from what the trunk hands over to the network's own output. Where a value of the trunk is not read by
        layers that can take U_i into their weights alone, it starts with an :class:`Unmerge`.
    """
    root = copy.copy(graph.module)  # shallow: `unmerge` is added to the copy alone
    root._modules = dict(graph.module._modules)
    unmerges = nn.ModuleDict()
    root._modules[UNMERGE] = unmerges
    head = fx.Graph()
    built: dict[fx.Node, fx.Node] = {}
    by_name = {node.name: node for node in graph.fx_graph.nodes}
    inputs = {crossing.node: head.placeholder(crossing.node) for crossing in graph.crossings}
    for crossing in graph.crossings:
        value = inputs[crossing.node]
        if crossing.ref is not None and crossing.axis is not None and not crossing.absorbed:
            unmerges[crossing.node] = Unmerge(crossing.ref.size, crossing.axis)
            value = head.call_module(f"{UNMERGE}.{crossing.node}", (value,))
        elif _changed_in_place(by_name[crossing.node], graph):
            value = head.call_method("clone", (value,))  # the other heads read it too
        built[by_name[crossing.node]] = value
    for node in graph.fx_graph.nodes:
        if node.name not in graph.trunk_nodes and node.op != "placeholder":
            built[node] = head.node_copy(node, built.__getitem__)
    return _module(root, head, "Head")


VIEWS = {
    *("view", "reshape", "flatten", "squeeze", "unsqueeze", "permute", "transpose", "contiguous", "detach", "chunk"),
    *("split", "getitem", "to", "float", "dropout", "Flatten", "Identity", "Dropout", "Dropout2d"),
}
"""Operators whose result can share memory with their input."""


def _changed_in_place(node: fx.Node, graph: MergeGraph) -> bool:
    """Whether the head writes into a value of the trunk."""
    for user in node.users:
        if user.name in graph.trunk_nodes or user.op == "output":
            continue
        module = graph.module.get_submodule(str(user.target)) if user.op == "call_module" else None
        name = type(module).__name__ if module else getattr(user.target, "__name__", str(user.target))
        in_place = getattr(module, "inplace", False) or user.kwargs.get("inplace") or name.endswith("_")
        if (
            in_place
            or name in ("iadd", "isub", "imul", "itruediv")
            or (name in VIEWS and _changed_in_place(user, graph))
        ):
            return True
    return False


def set_unmerges(head: nn.Module, graph: MergeGraph, maps: Mapping[str, SpaceMap], source: int) -> None:
    """Tell the explicit unmerges of a head which merged feature stands for each of its source's.

    Args:
        head: a head made by :func:`build_head` from ``graph``.
        graph: the merge graph of that source.
        maps: the matching of each space.
        source: the number of the source model.
    """
    for crossing in graph.crossings:
        if crossing.ref is not None and not crossing.absorbed:
            targets = {space: maps[space].targets(source) for space in crossing.ref.spaces}
            head.get_buffer(f"{UNMERGE}.{crossing.node}.index").copy_(crossing.ref.index(targets))


def _module(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    graph.lint()
    module = fx.GraphModule(root, graph, class_name=name)
    module = copy.deepcopy(module)  # own weights: the traced network stays as it is
    module.meta.clear()
    return module
