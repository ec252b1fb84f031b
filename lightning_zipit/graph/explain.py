"""Check that every use of every parameter is explained: by an axis of features, or by positions of the input.

An unexplained parameter would be averaged entry by entry, although the order of its entries may differ between models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from lightning_zipit.graph.values import Features, Opaque, Parameter, Plain, leaves, parts_of


def unexplained(
    node: fx.Node,
    module: nn.Module,
    tensors: Mapping[int, str],
    inputs: Any,
    output: Any,
    explained: set[str],
) -> list[str]:
    """Find the parameters and buffers that a node uses and its rule does not explain.

    Args:
        node: the node.
        module: the network.
        tensors: the name of every tensor of the network, by its ``id``.
        inputs: the values of the node's arguments.
        output: the return value of the rule. The users of a returned parameter must explain it.
        explained: the parameters that the rule has read, written or recorded as positional.

    Returns:
        The names. Tensors of an integer type, and tensors with one entry, need no explanation.
    """
    if not any(isinstance(value, (Features, Plain, Opaque, Parameter)) for value in leaves(output)):
        return []
    handed_on = {part.name for value in leaves(output) for part in parts_of(value)}
    used = dict.fromkeys(part.name for value in leaves(inputs) for part in parts_of(value) if part.counts)
    if node.op == "call_module":
        used |= dict.fromkeys(_names(module.get_submodule(str(node.target)), tensors))
    return [name for name in used if name not in explained | handed_on]


def counts(tensor: Tensor) -> bool:
    """Whether the order of a tensor's entries may differ between models: several entries, not of an integer type."""
    return tensor.numel() > 1 and (tensor.is_floating_point() or tensor.is_complex())


def _names(module: nn.Module, tensors: Mapping[int, str]) -> Iterator[str]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if counts(tensor):
            yield tensors.get(id(tensor), name)
