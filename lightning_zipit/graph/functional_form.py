"""Replaces operators that write in place by those that return a new tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from lightning_zipit.graph.run import IN_PLACE

aten = torch.ops.aten

IN_EVAL_MODE = frozenset(
    {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default}
)
"""Operators that return their input itself in eval mode, which their schema does not say."""


def writes(node: fx.Node) -> bool:
    """Whether a node changes a tensor that it is given."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def shares_memory(node: fx.Node) -> bool:
    """Whether the result of a node can share memory with its first input: a view, or the input itself."""
    if not isinstance(node.target, OpOverload):
        return node.op == "call_function"  # such as `getitem` of a tuple of views
    returned = any(value.alias_info is not None for value in node.target._schema.returns)
    return returned or node.target in IN_EVAL_MODE


def make_functional(graph: fx.Graph) -> list[fx.Node]:
    """Replace each operator in place whose target no tensor that is read later shares memory with.

    Args:
        graph: the graph; it is changed.

    Returns:
        The nodes that still write in place.
    """
    left = []
    for node in list(graph.nodes):
        if writes(node) and not _replace(graph, node):
            left.append(node)
    return left


def _replace(graph: fx.Graph, node: fx.Node) -> bool:
    target, twin = node.args[0] if node.args else None, _twin(node.target)
    if twin is None or not isinstance(target, fx.Node) or target.op == "get_attr" or not _same_type(node):
        return False
    order = {each: number for number, each in enumerate(graph.nodes)}
    family = _family(target)
    base = next(iter(family))
    if base.op == "get_attr":
        return False
    earlier = (member for member in family if member is not target and order[member] < order[node])
    if any(order[user] > order[node] for member in earlier for user in member.users):
        return False  # it would see the new values
    with graph.inserting_before(node):
        new = graph.call_function(twin, node.args, node.kwargs)
    new.meta = {**node.meta, IN_PLACE: node.target}
    node.replace_all_uses_with(new)
    target.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and order[user] > order[node])
    graph.erase_node(node)
    return True


def _twin(operator: Any) -> OpOverload | None:
    """The operator that computes the same as one in place, and returns a new tensor."""
    namespace, _, name = operator._schema.name.partition("::")
    if not name.endswith("_") or name.endswith("__") or any(arg.is_out for arg in operator._schema.arguments):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    if packet is None:
        return None
    wanted = [(argument.name, str(argument.type)) for argument in operator._schema.arguments]
    for overload in sorted(packet.overloads(), key=lambda each: each != operator._overloadname):
        twin = getattr(packet, overload)
        taken = [(argument.name, str(argument.type)) for argument in twin._schema.arguments]
        if taken == wanted and not twin._schema.is_mutable:  # pow_.Scalar is pow.Tensor_Scalar
            return twin
    return None


def _family(node: fx.Node) -> dict[fx.Node, None]:
    """The tensors that can share memory with one, the first of which is the one that they are views of."""
    base = node
    while base.op == "call_function" and shares_memory(base) and base.all_input_nodes:
        base = base.all_input_nodes[0]
    return dict.fromkeys(_views(base))


def _views(node: fx.Node) -> Iterator[fx.Node]:
    yield node
    for user in node.users:
        if user.op == "call_function" and shares_memory(user) and user.all_input_nodes[0] is node:
            yield from _views(user)


def _same_type(node: fx.Node) -> bool:
    """Whether the result has the type of the target by torch's promotion, too."""
    target, *others = (each.meta["val"] for each in node.all_input_nodes)
    kinds = {other.dtype for other in others if isinstance(other, Tensor) and other.ndim} - {torch.bool}
    if target.dtype.is_floating_point:
        kinds = {kind for kind in kinds if kind.is_floating_point or kind.is_complex}
    return kinds <= {target.dtype}
