"""Parameters that hold no features: they hold positions, or the sources cannot share them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from lightning_zipit.graph.notes import reached
from lightning_zipit.graph.prove import SAMPLES, Failure
from lightning_zipit.graph.replay import agree, run_nodes, swapped, tensors_in
from lightning_zipit.graph.spaces import MergeGraph
from lightning_zipit.graph.table import bind, named_tensors

ALIKE = 1e-2
"""How far outputs may be apart, relative to the largest, where a parameter is taken from another source."""


def positional(graph: MergeGraph) -> list[str]:
    """The floating-point parameters and buffers of the trunk, of more than one entry, that hold no features."""
    tensors, nodes = named_tensors(graph.module), list(graph.trunk_graph())
    used = set(reached(nodes, set(nodes), tensors))
    rows = {name: row for name, row in graph.axes.items() if name in used}
    return [
        name
        for name, tensor, row in bind(rows, graph.module)
        if name in used and tensor.is_floating_point() and tensor.numel() > 1 and not any(row)
    ]


def find_unlike(
    networks: Mapping[str, nn.Module], graphs: Mapping[str, MergeGraph], inputs: Mapping[str, Tensor]
) -> list[Failure]:
    """The parameters without features whose values the sources cannot share.

    Such parameters are averaged entry by entry. That is right where entry k means the same in all sources, as it does
    for position k of the input. Then the values of one source serve another: each source is run with those of the
    first, and must return nearly the same.

    Args:
        networks: by task; they are left as they are.
        graphs: the merge graph of each.
        inputs: an input of each; its first samples are used.

    Returns:
        One failure for each parameter that does not serve, whose barriers are the nodes that use it.
    """
    names = positional(next(iter(graphs.values())))
    (first, *others), failures = networks, []
    known = named_tensors(networks[first])
    with torch.inference_mode(False), torch.no_grad():
        for name in names:
            for task in others:
                value = known[name].to(named_tensors(networks[task])[name])
                x = inputs[task][:SAMPLES].detach()
                if not _serves(networks[task], graphs[task], name, value, x):
                    why = f"tasks {first!r} and {task!r} have different values of `{name}`, which holds no features"
                    failures.append(Failure(name, _users(graphs[first], name), why))
                    break
    return failures


def _serves(network: nn.Module, graph: MergeGraph, name: str, value: Tensor, x: Tensor) -> bool:
    """Whether a network computes nearly the same with another value of a parameter."""
    if torch.equal(named_tensors(network)[name], value):
        return True
    nodes = list(graph.fx_graph.nodes)
    inputs = {node: x for node in nodes if node.op == "placeholder"}
    expected = tensors_in(list(run_nodes(network, nodes, inputs, nodes[-1:]).values()))
    with swapped(network, {name: value}):
        found = tensors_in(list(run_nodes(network, nodes, inputs, nodes[-1:]).values()))
    return all(agree(tensor, other, ALIKE) for tensor, other in zip(expected, found, strict=True))


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
