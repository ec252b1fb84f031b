"""Puts modules back into a captured graph: operators that are one call of a module become that call."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable

from torch import fx, nn

from lightning_zipit.graph.dtypes import FOLLOWS
from lightning_zipit.graph.naming import call_of, name_nodes
from lightning_zipit.graph.run import IN_PLACE
from lightning_zipit.graph.training import IN_TRAINING

OF_OPERATORS = (IN_PLACE, FOLLOWS, IN_TRAINING)
"""What is noted of the arguments of operators."""


def fold(graph: fx.Graph, network: nn.Module, whole: Callable[[nn.Module], bool]) -> None:
    """Replace the operators of calls of modules by ``call_module``, so that modes, hooks and types of the modules stay.

    A call is replaced if the module's forward takes one argument, its operators read one tensor from elsewhere beside
    parameters of the module, and one of their results, which is no part of a tuple, is read elsewhere.

    Args:
        graph: a captured graph; it is changed.
        network: the network that it is of.
        whole: whether a module is to stay whole. Of modules inside each other, the outermost is asked first.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if (call := _outermost(node, network, whole)) is not None:
            calls.setdefault(call, []).append(node)
    for call, nodes in calls.items():
        name = call.partition("@")[0]
        if _takes_one(network.get_submodule(name)):
            _replace(graph, name, nodes)
    _drop_unused(graph)
    name_nodes(graph.nodes)


def _outermost(node: fx.Node, network: nn.Module, whole: Callable[[nn.Module], bool]) -> str | None:
    """The outermost call around an operator whose module is to stay whole."""
    if node.op != "call_function":
        return None
    calls = call_of(node)
    return next((call for call in calls if call and whole(network.get_submodule(call.partition("@")[0]))), None)


def _replace(graph: fx.Graph, name: str, nodes: list[fx.Node]) -> None:
    inside = set(nodes)
    given = {source for node in nodes for source in node.all_input_nodes if source not in inside}
    inputs = [source for source in given if "shape" in source.meta and not _belongs(source, name)]
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    if len(inputs) != 1 or len(results) != 1 or results[0].target is operator.getitem:
        return
    with graph.inserting_after(results[0]):
        call = graph.call_module(name, (inputs[0],))
    call.meta = {key: value for key, value in results[0].meta.items() if key not in OF_OPERATORS}
    results[0].replace_all_uses_with(call)
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)


def _drop_unused(graph: fx.Graph) -> None:
    """Drop the nodes that modules now compute themselves, such as reads of their parameters."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _takes_one(module: nn.Module) -> bool:
    needed = [each for each in inspect.signature(module.forward).parameters.values() if each.default is each.empty]
    return len(needed) == 1 and needed[0].kind is not needed[0].VAR_POSITIONAL


def _belongs(source: fx.Node, name: str) -> bool:
    """Whether a node reads a parameter or buffer of a module."""
    return source.op == "get_attr" and str(source.target).startswith(f"{name}.")
