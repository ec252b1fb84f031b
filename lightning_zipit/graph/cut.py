"""The trunk's end: at a named module, or before the last layer."""

from __future__ import annotations

import difflib
import operator

import numpy as np
from torch import fx, nn

from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.naming import modules_around
from lightning_zipit.graph.notes import reached
from lightning_zipit.graph.order import ancestors, descendants, with_constants
from lightning_zipit.graph.spaces import MergeGraph
from lightning_zipit.graph.values import Features, Opaque, leaves


def find_trunk(
    backbone: nn.Module, nodes: list[fx.Node], stop_at: str | None, shapes: dict[str, tuple[int, ...]], whole: bool
) -> set[fx.Node]:
    """Find the nodes of the trunk: those that the last module, or the heads, depend on.

    Args:
        backbone: the network.
        nodes: the nodes of its graph in order.
        stop_at: the trunk's last module; ``None`` for everything down to the last layer.
        shapes: known shapes of tensors by node name.
        whole: whether the trunk includes the last layer.

    Raises:
        ConfigurationError: if ``stop_at`` does not exist, or leaves no head.
    """
    body = [node for node in nodes if node.op != "output"]
    inputs = {node for node in nodes if node.op == "placeholder"}  # heads get inputs through the trunk
    if stop_at is None:
        head = set() if whole else descendants(_last_layers(backbone, nodes, shapes), nodes)
        trunk = with_items(ancestors(_inputs_of(body, head), nodes), nodes, shapes) if head else set(body)
        return with_constants(trunk | inputs, nodes)
    inside = [node for node in body if stop_at in modules_around(node) or node.target == stop_at]
    if not inside:
        raise ConfigurationError(no_such_module(backbone, nodes, "stop_at", stop_at))
    trunk = with_items(ancestors(set(inside), nodes), nodes, shapes)
    if not whole and trunk & _last_layers(backbone, nodes, shapes):
        raise ConfigurationError(
            f"stop_at={stop_at!r} leaves no head: the last layer would be in the trunk. Use stop_at=None to zip "
            "everything down to the last layer, or merge_heads=True if all models share one output space."
        )
    return with_constants(trunk | inputs, nodes)


def find_cuts(graph: MergeGraph) -> list[str]:
    """Find the modules where a shorter trunk could end, so that a single tensor passes to the heads.

    Args:
        graph: a merge graph.

    Returns:
        Module names in the order of execution. Of modules that leave the same layers in the trunk, only the last.

    Example:
        >>> from lightning_zipit import trace
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> find_cuts(trace(net))
        ['1']
    """
    nodes, trunk = list(graph.fx_graph.nodes), set(graph.trunk_graph())
    weights = {
        name: weight for name, weight in graph.module.named_parameters(remove_duplicate=False) if weight.ndim > 1
    }
    inside: dict[str, set[fx.Node]] = {}
    for node in (node for node in nodes if node in trunk):
        called = [str(node.target)] if node.op == "call_module" else []
        for name in filter(None, [*modules_around(node), *called]):
            inside.setdefault(name, set()).add(node)
    found: dict[tuple[str, ...], tuple[str, int]] = {}  # key: the layers in the trunk
    for name, last in inside.items():
        own = ancestors(last, nodes) & trunk
        layers = tuple(reached(nodes, own, weights))
        handed = [node for node in own if graph.held.get(node.name) and not own.issuperset(node.users)]
        if len(handed) == 1 and len(own) > found.get(layers, ("", 0))[1]:
            found[layers] = (name, len(own))
    for layers in ((), tuple(reached(nodes, trunk, weights))):
        found.pop(layers, None)
    return [name for _, (name, _) in sorted(found.items(), key=lambda item: len(item[0]))]


def with_items(trunk: set[fx.Node], nodes: list[fx.Node], shapes: dict[str, tuple[int, ...]]) -> set[fx.Node]:
    """Add the items of tuples that the trunk returns, because the inputs of heads must be tensors."""
    trunk = set(trunk)
    for node in nodes:
        made_of = node.args[0] if node.target is operator.getitem else None
        if isinstance(made_of, fx.Node) and made_of in trunk and made_of.name not in shapes:
            trunk.add(node)
    return trunk


def _last_layers(backbone: nn.Module, nodes: list[fx.Node], shapes: dict[str, tuple[int, ...]]) -> set[fx.Node]:
    """Find the nodes whose parameters write outputs that differ between tasks, such as the scores of classes.

    Returned features that a layer reads too, as those of a residual stream, are features of the trunk: heads unmerge
    them.
    """
    ctx = Context(backbone, shapes)
    values = ctx.run(nodes, {}, tolerant=set(nodes))
    output = [value.ids.ravel() for value in leaves(values[nodes[-1]]) if isinstance(value, (Features, Opaque))]
    component = ctx.components()
    events = [event for events in ctx.events.values() for event in events]
    read = [event.entries for event in events if event.kind in ("consumer", "reader")]
    returned, inside = (component[np.concatenate([np.empty(0, np.int64), *ids])] for ids in (output, read))
    returned = np.setdiff1d(returned, inside)
    return {
        event.node for event in events if event.kind == "producer" and np.isin(component[event.entries], returned).any()
    }


def _inputs_of(body: list[fx.Node], head: set[fx.Node]) -> set[fx.Node]:
    read = {source for node in head for source in node.all_input_nodes}
    return {node for node in body if node in read and node not in head}


def no_such_module(backbone: nn.Module, nodes: list[fx.Node], argument: str, wanted: str) -> str:
    """Build the error message for a ``start_at`` or ``stop_at`` that is not a called module."""
    names = [name for name, _ in backbone.named_modules() if name]
    if wanted in names:
        return (
            f"{argument}={wanted!r} is a module of the backbone, but the backbone's forward does not call it. Choose a "
            "module that the forward calls."
        )
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Its modules are {', '.join(names[:12])}, …"
    return f"{argument}={wanted!r} is not a module of the backbone ({type(backbone).__name__}). {hint}"
