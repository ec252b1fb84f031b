"""Reassembly of a merged trunk and a head into one network of the source architecture."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_zipit._common.arguments import ARGUMENTS, Arguments, names_of
from lightning_zipit._common.calls import Call
from lightning_zipit._common.structure import flatten
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph.capture import BATCHES, Captured
from lightning_zipit.graph.part import Added, Part, graph_of
from lightning_zipit.graph.returned import RETURNED, tensors_returned
from lightning_zipit.graph.shapes import evaluating, note_shapes
from lightning_zipit.graph.sizes import Sizes

UNMERGE = "unmerge"
"""Usual name of the submodule of a head that holds its explicit unmerge operators; see ``name_of_added``."""


class Joined(nn.Module):
    """A network of a merged trunk and the head of one task, which can be merged again. It shares their tensors.

    Explicit unmerge operators are not part of the architecture. The forward omits them. A new merge composes them with
    its own.

    Args:
        trunk: the trunk.
        head: the head of one task.
        barriers: nodes that were kept out of the trunk, and the reasons.
        arguments: the arguments of the forward of the sources.

    Raises:
        ConfigurationError: if both the trunk and the head call the same module.

    Attributes:
        unmerge: the explicit unmerge operators of values that pass from trunk to head. Weights unmerge other values.
    """

    def __init__(self, trunk: Part, head: Part, barriers: Mapping[str, str], arguments: Arguments) -> None:
        super().__init__()
        vars(self)[ARGUMENTS] = arguments
        unmerge = next((name for name, module in head._modules.items() if isinstance(module, Added)), UNMERGE)
        self._barriers = dict(barriers)  # modules of the network may have names without an underscore
        self._graph = fx.Graph()
        built: dict[fx.Node, fx.Node] = {}
        for node in graph_of(trunk).nodes:
            if node.op != "output":
                built[node] = self._graph.node_copy(node, built.__getitem__)
        crossing = iter(next(iter(reversed(graph_of(trunk).nodes))).args[0])
        for node in graph_of(head).nodes:
            if node.op == "placeholder":
                built[node] = built[next(crossing)]
            elif node.op == "call_module" and str(node.target).startswith(f"{unmerge}."):
                built[node] = built[node.all_input_nodes[0]]
            else:
                built[node] = self._graph.node_copy(node, built.__getitem__)
        self._take(trunk, unmerge)
        self._take(head, unmerge)
        self.add_module(unmerge, head._modules.get(unmerge) or Added())

    def _take(self, part: Part, unmerge: str) -> None:
        """Add the modules and tensors that a part uses, under the same names, without its unmerge operators."""
        names = {str(node.target) for node in graph_of(part).nodes if node.op in ("call_module", "get_attr")}
        for name in sorted(name for name in names if not name.startswith(f"{unmerge}.")):
            *path, attribute = name.split(".")
            owner: nn.Module = self
            for step in path:
                if step not in owner._modules:
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            if attribute in owner._modules | owner._parameters | owner._buffers:
                raise ConfigurationError(
                    f"Both the trunk and a head of a merged module call module `{name}`, so the two cannot be merged "
                    "again as one network. Choose a `stop_at` that leaves all calls of the module in one part."
                )
            found = attrgetter(name)(part)
            if isinstance(found, Tensor) and not isinstance(found, nn.Parameter):
                owner.register_buffer(attribute, found)
            else:
                setattr(owner, attribute, found)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return fx.Interpreter(self, graph=self._graph).run(
            *Arguments.of(self).bind(Call.of_arguments(args, kwargs)).tensors
        )


def barriers_of(network: Joined) -> dict[str, str]:
    """Return the nodes that were kept out of the trunk of a joined network, and the reasons."""
    return network._barriers


def capture_joined(network: Joined, example: Any) -> Captured:
    """Return a joined network as a capture. Callers may change its graph.

    Args:
        network: the network.
        example: an input; see :func:`~lightning_zipit.graph.capture.capture`.
    """
    call = Arguments.of(network).bind(Call.of(example))
    inputs, batches = call.structure, [list(call.repeated(samples).tensors) for samples in BATCHES]
    graph = copy.deepcopy(network._graph)
    output = next(iter(reversed(graph.nodes)))
    output.args = (tuple(tensors_returned(graph)),)
    graph.eliminate_dead_code(lambda node: node.target != RETURNED)
    note_shapes(network, graph, batches[0])
    with torch.no_grad(), evaluating(network):
        _, outputs = flatten(network(*batches[0]), "output")
    sizes = Sizes(tuple(names_of(inputs, network)), tuple(tuple(tensor.shape) for tensor in batches[0]))
    return Captured(graph, inputs, outputs, sizes.with_free_batch(batches), arguments=Arguments.of(network))
