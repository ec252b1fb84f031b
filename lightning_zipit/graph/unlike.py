"""Check of parameters and buffers without features: they must be interchangeable between sources to be shared."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from lightning_zipit._common.calls import Call
from lightning_zipit.graph.notes import reached
from lightning_zipit.graph.prove import SAMPLES, Failure
from lightning_zipit.graph.replay import agree, returned, swapped
from lightning_zipit.graph.run import Run
from lightning_zipit.graph.spaces import MergeGraph
from lightning_zipit.graph.table import bind, named_tensors

ALIKE = 1e-2
"""Tolerance of outputs, relative to the largest output, if a parameter is taken from another source."""


def unmerged(graph: MergeGraph) -> list[str]:
    """Return the names of the trunk's parameters and buffers that sources share without matching.

    These are tensors without features, and tensors of an integer or boolean type, which have no mean. A parameter with
    one entry is excluded, because it is averaged like any weight.
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
    networks: Mapping[str, nn.Module], graphs: Mapping[str, MergeGraph], inputs: Mapping[str, Call]
) -> list[Failure]:
    """Find the parameters and buffers without features whose values cannot be shared by all sources.

    The trunk has one value for all sources: the mean of positional parameters, and the first source's value of integer
    tensors. This is right if entry k means the same in all sources, such as position k of the input. In that case, the
    values of one source work in another. Therefore each source is run with the values of the first source, and its
    outputs must be nearly the same.

    Args:
        networks: the networks by task; they are not changed.
        graphs: the merge graph of each network.
        inputs: an input of each network; its first samples are used.

    Returns:
        One failure for each tensor that cannot be shared. Its barriers are the nodes that use the tensor.
    """
    (first, *others), failures = networks, {}
    known = named_tensors(networks[first])
    names = unmerged(graphs[first])
    with torch.inference_mode(False), torch.no_grad():
        for task in others:
            own, graph, x = named_tensors(networks[task]), graphs[task], inputs[task].first(SAMPLES).each(Tensor.detach)
            values = {name: known[name].to(own[name]) for name in names}
            unlike = {name: value for name, value in values.items() if not torch.equal(own[name], value)}
            if not unlike:
                continue
            substitution = _Substitution(networks[task], graph, x)
            if substitution.works_with(unlike):
                continue
            separately = [name for name, value in unlike.items() if not substitution.works_with({name: value})]
            for name in separately or unlike:
                why = (
                    f"tasks {first!r} and {task!r} have different values of `{name}`, which holds no features to match"
                )
                failures[name] = Failure(name, _users(graphs[first], name), why)
    return list(failures.values())


class _Substitution:
    """A network whose outputs are compared before and after some of its tensors are replaced."""

    def __init__(self, network: nn.Module, graph: MergeGraph, x: Call) -> None:
        self.network, self.x = network, x
        self.run = Run(network, graph.fx_graph)
        self.expected = returned(self.run, x)

    def works_with(self, values: Mapping[str, Tensor]) -> bool:
        """Whether the outputs stay nearly the same with these values."""
        try:
            with swapped(self.network, values):
                found = returned(self.run, self.x)
        except Exception:  # indices of one network may be out of range in another
            return False
        return all(agree(tensor, other, ALIKE) for tensor, other in zip(self.expected, found, strict=True))


def _users(graph: MergeGraph, name: str) -> tuple[str, ...]:
    """Return the names of the trunk's nodes that use a parameter."""
    found: list[fx.Node] = []
    for node in graph.trunk_graph():
        target = str(node.target)
        if node.op == "call_module" and name.startswith(f"{target}."):
            found.append(node)
        elif node.op == "get_attr" and name == target:
            found += node.users
    return tuple(node.name for node in found)
