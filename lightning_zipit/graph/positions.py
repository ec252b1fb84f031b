"""Finds parameters and buffers that have no features and differ between sources, so that they cannot be shared."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from lightning_zipit.graph.notes import reached
from lightning_zipit.graph.prove import SAMPLES, Failure
from lightning_zipit.graph.replay import agree, returned, swapped
from lightning_zipit.graph.run import Run
from lightning_zipit.graph.spaces import MergeGraph
from lightning_zipit.graph.table import bind, named_tensors

ALIKE = 1e-2
"""How far outputs may be apart, relative to the largest, where a parameter is taken from another source."""


def unmerged(graph: MergeGraph) -> list[str]:
    """The parameters and buffers of the trunk that are not merged by their features, but must be alike in all sources.

    They are those without features, and all that hold whole numbers or truth values, of which no mean can be taken.
    A parameter of one entry is a weight like any other.
    """
    tensors, nodes = named_tensors(graph.module), list(graph.trunk_graph())
    used = set(reached(nodes, set(nodes), tensors))
    rows = {name: row for name, row in graph.axes.items() if name in used}
    return [
        name
        for name, tensor, row in bind(rows, graph.module)
        if name in used
        and (not tensor.is_floating_point() or not any(row))
        and not (isinstance(tensor, nn.Parameter) and tensor.numel() == 1)
    ]


def find_unlike(
    networks: Mapping[str, nn.Module], graphs: Mapping[str, MergeGraph], inputs: Mapping[str, Tensor]
) -> list[Failure]:
    """The parameters and buffers whose values the sources cannot share, although the trunk would have one for all.

    Positions are averaged entry by entry, and whole numbers are those of the first source. That is right where entry k
    means the same in all sources, as it does for position k of the input. Then the values of one source serve another:
    each source is run with those of the first, and must return nearly the same.

    Args:
        networks: by task; they are left as they are.
        graphs: the merge graph of each.
        inputs: an input of each; its first samples are used.

    Returns:
        One failure for each tensor that does not serve, whose barriers are the nodes that use it.
    """
    (first, *others), failures = networks, {}
    known = named_tensors(networks[first])
    names = unmerged(graphs[first])
    with torch.inference_mode(False), torch.no_grad():
        for task in others:
            own, graph, x = named_tensors(networks[task]), graphs[task], inputs[task][:SAMPLES].detach()
            values = {name: known[name].to(own[name]) for name in names}
            unlike = {name: value for name, value in values.items() if not torch.equal(own[name], value)}
            if not unlike:
                continue
            served = _Served(networks[task], graph, x)
            if served.by(unlike):
                continue
            alone = [name for name, value in unlike.items() if not served.by({name: value})]
            for name in alone or unlike:
                why = f"tasks {first!r} and {task!r} have different values of `{name}`, which is not merged by features"
                failures[name] = Failure(name, _users(graphs[first], name), why)
    return list(failures.values())


class _Served:
    """A network whose outputs are compared with those that it has with other values of some tensors."""

    def __init__(self, network: nn.Module, graph: MergeGraph, x: Tensor) -> None:
        self.network, self.x = network, x
        self.run = Run(network, graph.fx_graph)
        self.expected = returned(self.run, x)

    def by(self, values: Mapping[str, Tensor]) -> bool:
        """Whether the network computes nearly the same with these values."""
        try:
            with swapped(self.network, values):
                found = returned(self.run, self.x)
        except Exception:  # indices of one network may lie outside of what another has
            return False
        return all(agree(tensor, other, ALIKE) for tensor, other in zip(self.expected, found, strict=True))


def _users(graph: MergeGraph, name: str) -> tuple[str, ...]:
    """The nodes of the trunk that use a parameter."""
    found: list[fx.Node] = []
    for node in graph.trunk_graph():
        target = str(node.target)
        if node.op == "call_module" and name.startswith(f"{target}."):
            found.append(node)
        elif node.op == "get_attr" and name == target:
            found += node.users
    return tuple(node.name for node in found)
