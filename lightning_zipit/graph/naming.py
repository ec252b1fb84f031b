"""Human-readable names and locations of graph nodes."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable

from torch import fx, nn
from torch._ops import OpOverload


def symbol(node: fx.Node, module: nn.Module) -> str:
    """Return the first argument of ``register_rule`` as code: a class, an operator or a function."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    if isinstance(node.target, OpOverload):
        return f"torch.ops.{node.target}"
    return getattr(node.target, "__name__", str(node.target))


def location(node: fx.Node) -> str:
    """Return the full name of the module whose forward calls the node."""
    inside = modules_around(node)
    return inside[-1] if inside and inside[-1] else "the backbone's own forward"


def modules_around(node: fx.Node) -> list[str]:
    """Return the full names of the modules whose forwards contain the node, from the outermost to the innermost."""
    return [name.partition("@")[0] for name in node.meta.get("nn_module_stack") or ()]  # "name@2" is the second call


def call_of(node: fx.Node) -> list[str]:
    """The calls of modules around the node, outermost first: full names, with ``@`` and a number from the second on."""
    return list(node.meta.get("nn_module_stack") or ())


def place_of(node: fx.Node) -> str:
    """Return the full name of the module that a node calls, or of the module whose forward contains the node."""
    return str(node.target) if node.op == "call_module" else location(node)


def describe_node(node: fx.Node, module: nn.Module) -> str:
    """Describe a node by its operator and its module."""
    if node.op == "call_module":
        return f"Module `{node.target}` ({symbol(node, module)})"
    return f"Operator `{operator_name(node)}` in `{location(node)}` (node `{node.name}`)"


def operator_name(node: fx.Node) -> str:
    """Return the name of a node's operator without namespace and overload, such as ``relu``."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return getattr(node.target, "__name__", str(node.target))


def name_nodes(nodes: Iterable[fx.Node]) -> set[str]:
    """Name nodes for their modules and operators; a number tells nodes of one name apart.

    Args:
        nodes: the nodes in order; their names are changed.

    Returns:
        The names.
    """
    taken: set[str] = set()
    for node in nodes:
        node.name = free_name(_plain_name(node), taken)
    return taken


def free_name(base: str, taken: set[str]) -> str:
    """Return a name that is not taken, and add it to those that are.

    Names of Python get a number, as torch.fx gives them one when it copies a node.
    """
    name, number = base, 0
    while name in taken or hasattr(builtins, name) or keyword.iskeyword(name):
        number += 1
        name = f"{base}_{number}"
    taken.add(name)
    return name


def _plain_name(node: fx.Node) -> str:
    if node.op == "call_function":
        return re.sub(r"\W", "_", operator_name(node))
    name = re.sub(r"\W+", "_", str(node.target)).strip("_")
    return f"_{name}" if name[:1].isdigit() else name
