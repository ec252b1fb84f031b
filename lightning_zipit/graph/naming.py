"""Human-readable names and locations of graph nodes."""

from __future__ import annotations

from torch import fx, nn


def symbol(node: fx.Node, module: nn.Module) -> str:
    """Return the first argument of ``register_rule`` as code: a class, a function, or the quoted name of a method."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    if node.op == "call_method":
        return repr(node.target)
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
    name = symbol(node, module)
    if node.op == "call_module":
        return f"Module `{node.target}` ({name})"
    kind = {"call_method": "Tensor method", "call_function": "Function"}.get(node.op, "Node")
    return f"{kind} `{name.strip(chr(39))}` in `{location(node)}` (node `{node.name}`)"
