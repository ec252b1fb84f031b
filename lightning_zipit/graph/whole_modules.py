"""Puts modules back into a captured graph: operators that are one call of a module become that call."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from lightning_zipit._common.structure import Structure, UnknownContainerError, flatten
from lightning_zipit.graph.decisions import node_of
from lightning_zipit.graph.dtypes import FOLLOWS
from lightning_zipit.graph.naming import call_of, name_nodes
from lightning_zipit.graph.returned import is_written_out
from lightning_zipit.graph.run import IN_PLACE
from lightning_zipit.graph.training import IN_TRAINING

OF_OPERATORS = (IN_PLACE, FOLLOWS, IN_TRAINING)
"""What is noted of the arguments of operators."""


GIVEN = "given_to"
"""Key of the calls of modules that are given the result of a node, and its number among the tensors of the call."""


class NoteCalls:
    """Notes what modules of several arguments are called with, while a network is captured.

    Args:
        network: the network, which gets hooks.

    Attributes:
        calls: the structure of positional and keyword arguments, by the name of the call.
    """

    def __init__(self, network: nn.Module) -> None:
        self.calls: dict[str, Structure] = {}
        self._counts: Counter[str] = Counter()
        for name, module in network.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule) and not _takes_one(module):
                module.register_forward_pre_hook(partial(self._note, name), with_kwargs=True)

    def start(self) -> None:
        """Start over, as torch.export may run a forward several times."""
        self.calls.clear()
        self._counts.clear()

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number = self._counts[name]
        self._counts[name] += 1
        call = f"{name}@{number}" if number else name
        try:
            tensors, structure = flatten((args, kwargs))
        except UnknownContainerError:
            return
        nodes = [node_of(tensor) for tensor in tensors]
        if is_written_out(structure) and None not in nodes:
            self.calls[call] = structure
            for number, node in enumerate(nodes):
                node.meta.setdefault(GIVEN, []).append((call, number))  # type: ignore[union-attr]


def fold(
    graph: fx.Graph,
    network: nn.Module,
    whole: Callable[[nn.Module], bool],
    known: Mapping[str, Structure] | None = None,
) -> None:
    """Replace the operators of calls of modules by ``call_module``, so that modes, hooks and types of the modules stay.

    A call is replaced if its operators read nothing from elsewhere beside its arguments and parameters of the module,
    and one of their results, which is no part of a tuple, is read elsewhere. The argument of a forward of one argument
    is the tensor that its operators read.

    Args:
        graph: a captured graph; it is changed.
        network: the network that it is of.
        whole: whether a module is to stay whole. Of modules inside each other, the outermost is asked first.
        known: what calls of modules are given; see :class:`NoteCalls`.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if (call := _outermost(node, network, whole)) is not None:
            calls.setdefault(call, []).append(node)
    for call, nodes in calls.items():
        name = call.partition("@")[0]
        if _takes_one(network.get_submodule(name)):
            _replace(graph, name, nodes, None)
        elif known is not None and (arguments := _arguments(graph, call, known)) is not None:
            _replace(graph, name, nodes, arguments)
    _drop_unused(graph)
    name_nodes(graph.nodes)


def _outermost(node: fx.Node, network: nn.Module, whole: Callable[[nn.Module], bool]) -> str | None:
    """The outermost call around an operator whose module is to stay whole."""
    if node.op != "call_function":
        return None
    calls = call_of(node)
    return next((call for call in calls if call and whole(network.get_submodule(call.partition("@")[0]))), None)


def _replace(graph: fx.Graph, name: str, nodes: list[fx.Node], arguments: Any) -> None:
    """Replace the operators of a call of a module.

    Args:
        graph: the graph; it is changed.
        name: the name of the module.
        nodes: the operators.
        arguments: positional and keyword arguments; ``None`` for the one tensor that the operators read.
    """
    inside = set(nodes)
    outside = {source for node in nodes for source in node.all_input_nodes if source not in inside}
    inputs = [source for source in outside if "shape" in source.meta and not _belongs(source, name)]
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    if arguments is None and len(inputs) != 1:
        return
    arguments = arguments or (tuple(inputs), {})
    if len(results) != 1 or results[0].target is operator.getitem or not _is_given(inputs, arguments):
        return
    with graph.inserting_after(results[0]):
        call = graph.call_module(name, *arguments)
    call.meta = {key: value for key, value in results[0].meta.items() if key not in OF_OPERATORS}
    results[0].replace_all_uses_with(call)
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)


def _arguments(graph: fx.Graph, call: str, known: Mapping[str, Structure]) -> Any:
    """Positional and keyword arguments of a call; ``None`` if the graph does not have all its tensors."""
    given = {number: node for node in graph.nodes for name, number in node.meta.get(GIVEN, ()) if name == call}
    if call not in known or len(given) != known[call].count:
        return None
    return known[call].unflatten([given[number] for number in range(len(given))])


def _is_given(inputs: list[fx.Node], arguments: Any) -> bool:
    """Whether the tensors that the operators of a module read are among its arguments, one of which at least it has."""
    given: list[fx.Node] = []
    fx.map_arg(arguments, given.append)
    return bool(given) and set(inputs) <= set(given)


def _drop_unused(graph: fx.Graph) -> None:
    """Drop the nodes that modules now compute themselves, such as reads of their parameters."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _takes_one(module: nn.Module) -> bool:
    taken = list(inspect.signature(module.forward).parameters.values())
    return len(taken) == 1 and taken[0].kind not in (taken[0].VAR_POSITIONAL, taken[0].VAR_KEYWORD)


def _belongs(source: fx.Node, name: str) -> bool:
    """Whether a node reads a parameter or buffer of a module."""
    return source.op == "get_attr" and str(source.target).startswith(f"{name}.")
