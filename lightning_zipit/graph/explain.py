"""Every use of every parameter is explained: by an axis that holds features, or by positions that it lies along.

What is not would be averaged entry by entry, although its entries may come in another order in each model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from lightning_zipit.graph.values import Features, Joined, Opaque, Parameter, Plain, leaves, parts_of


def unexplained(
    node: fx.Node,
    module: nn.Module,
    tensors: Mapping[int, str],
    inputs: Any,
    output: Any,
    explained: set[str],
) -> list[str]:
    """The parameters and buffers that a node uses, and that its rule said nothing of.

    Args:
        node: the node.
        module: the network.
        tensors: the name of every tensor of the network, by its ``id``.
        inputs: the values of the node's arguments.
        output: what its rule returned. A parameter that it hands on is left to those who use that.
        explained: the parameters that the rule has read, written or found to hold positions.

    Returns:
        Their names. Whole numbers and single entries need no explanation.
    """
    if not any(isinstance(value, (Features, Plain, Opaque, Parameter, Joined)) for value in leaves(output)):
        return []
    handed_on = {part.name for value in leaves(output) for part in parts_of(value)}
    used = dict.fromkeys(part.name for value in leaves(inputs) for part in parts_of(value) if part.counts)
    if node.op == "call_module":
        used |= dict.fromkeys(_names(module.get_submodule(str(node.target)), tensors))
    return [name for name in used if name not in explained | handed_on]


def counts(tensor: Tensor) -> bool:
    """Whether a tensor has entries that could come in another order: more than one, and no whole numbers."""
    return tensor.numel() > 1 and (tensor.is_floating_point() or tensor.is_complex())


def _names(module: nn.Module, tensors: Mapping[int, str]) -> Iterator[str]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if counts(tensor):
            yield tensors.get(id(tensor), name)
