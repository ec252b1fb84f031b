"""Floating-point types that a forward takes from its tensors, such as ``dtype=x.dtype``: they follow ``.to(dtype)``."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from lightning_zipit._common.structure import Structure
from lightning_zipit.graph.decisions import node_of, user_line
from lightning_zipit.graph.observe import observing
from lightning_zipit.graph.replay import working_copy

FOLLOWS = "follows"
"""Key of what the type that a node writes out follows: :data:`NETWORK` or :data:`DEFAULT`."""
NETWORK = "the type of the network"
DEFAULT = "the default type of torch"
CALL = "call_with_type"
"""Key of the call of :class:`NoteTypes` that made a node."""

Types: TypeAlias = "dict[tuple[str, str], list[torch.dtype]]"
"""The types of results of calls in order, by line and function."""


class NoteTypes(TorchFunctionMode):
    """Notes the calls of a forward that are given a type, or take that of another tensor.

    Attributes:
        types: the types of their results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.types: Types = defaultdict(list)

    def start(self) -> None:
        """Start over, as torch.export may run a forward several times."""
        self.types.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = (*args, *(kwargs or {}).values())
        if isinstance(made, Tensor) and (func is Tensor.to or any(isinstance(each, torch.dtype) for each in given)):
            call = user_line(), getattr(func, "__name__", str(func))
            if (node := node_of(made)) is not None:
                node.meta[CALL] = call, len(self.types[call])
            self.types[call].append(made.dtype)
        return made


def note_followers(graph: fx.Graph, network: nn.Module, inputs: Structure, tensors: Sequence[Tensor]) -> None:
    """Note which types in a graph the forward takes from its tensors, by a run of the network in another type.

    A network that does not run in the other type is left as it is: its types are fixed.

    Args:
        graph: a captured graph; ``meta`` of its nodes is changed.
        network: the network; it is not changed.
        inputs: the structure of its arguments.
        tensors: the tensors of an input.
    """
    own = type_of(network)
    calls = [node for node in graph.nodes if CALL in node.meta and own in _values(node)]
    if own is None or not calls:
        return
    other = torch.float32 if own is torch.float64 else torch.float64
    types = _types_in(other, network, inputs, tensors)
    for node in calls:
        call, number = node.meta[CALL]
        if types.get(call, [])[number : number + 1] == [other]:
            node.meta[FOLLOWS] = NETWORK


def _types_in(dtype: torch.dtype, network: nn.Module, inputs: Structure, tensors: Sequence[Tensor]) -> Types:
    args, kwargs = inputs.unflatten([each.to(dtype) if each.is_floating_point() else each.clone() for each in tensors])
    try:
        with observing(), NoteTypes() as noting:
            working_copy(network).to(dtype)(*args, **kwargs)
    except Exception:  # whatever a forward raises for another type
        return {}
    return noting.types


def type_of(network: nn.Module) -> torch.dtype | None:
    """Return the type of the first floating-point parameter."""
    return next((each.dtype for each in network.parameters() if each.is_floating_point()), None)


def following(graph: fx.Graph, part: nn.Module) -> fx.Graph:
    """Return a graph in which the noted types are read from a parameter, or are the default of torch.

    Args:
        graph: the graph; it is not changed.
        part: the module that computes it. Without floating-point parameters, types that follow them are fixed.
    """
    found = {node.meta[FOLLOWS] for node in graph.nodes if FOLLOWS in node.meta}
    if not found:
        return graph
    graph = copy.deepcopy(graph)
    name = next((name for name, each in part.named_parameters() if each.is_floating_point()), None)
    read = None
    if NETWORK in found and name is not None:
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            read = graph.call_function(getattr, (graph.get_attr(name), "dtype"))
    for node in graph.nodes:
        follows = node.meta.get(FOLLOWS)
        if follows == DEFAULT:
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "dtype"}
        elif follows == NETWORK and read is not None:
            node.args = tuple(read if _is_floating(value) else value for value in node.args)
            node.kwargs = {key: read if _is_floating(value) else value for key, value in node.kwargs.items()}
    return graph


def _values(node: fx.Node) -> Iterator[Any]:
    yield from (*node.args, *node.kwargs.values())


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point
